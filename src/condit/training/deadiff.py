"""Training of DEADiff (arXiv:2403.06951, section 3) on a frozen Stable Diffusion. Each batch is of style pairs, content
pairs or reconstruction."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from pydantic import field_validator
from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.controls.deadiff import DEADiff, DEADiffConfig, DEADiffReference
from condit.controls.deadiff_layers import Name, coarse_layers, cross_shapes
from condit.data.grouped import PAIR_KINDS, PairKind
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.drawing.pipeline import Pipeline
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.image import TinyImage
from condit.encoders.qformer import BERT_WORDS, QFormerConfig
from condit.encoders.text import Text
from condit.training.denoising import errors, latents_of, load_base, run_of
from condit.training.export import ADAPTER, export_adapter
from condit.training.fields import Data, NotNegative, Probability, check_shares
from condit.training.loop import Task, to_device
from condit.training.paired import Paired, open_source
from condit.weights import deadiff as published
from condit.weights.clip_towers import load_image_encoder
from condit.weights.files import load_strict, own_fields, read_metadata, read_tensors

# The tokens that the network sees in a batch of each kind.
SHOWN: dict[PairKind, tuple[Name, ...]] = {
    "style": ("style",),
    "content": ("content",),
    "reconstruction": ("style", "content"),
}
# An untrained Q-Former needs only the two words of its queries; row 0 is padding and is not trained.
OWN_WORDS: dict[str, tuple[int, ...]] = {"style": (1,), "content": (2,)}
OWN_VOCABULARY = 3


class DEADiffData(Data):
    """model: a Stable Diffusion, or the embedded UNet. Pairs come from `icons` or from `pairs` (a folder or tars).

    held_out: pairs for validation. tower: the folder of a CLIP; None: the embedded model's own. plain_pixels: the tower
    reads [-1, 1] without CLIP's normalisation. init: an earlier export or the published checkpoint. blip: the folder of
    BLIP-Diffusion's release. qformer: fields of `QFormerConfig`. shares: how often a batch is of style pairs, content
    pairs, reconstruction. drop: how often a sample of each kind has zeros for its image tokens. caption_drop: how often
    a caption is empty (not in the released code).
    """

    model: str
    icons: str | None = None
    pairs: str | None = None
    held_out: str | None = None
    tower: str | None = None
    plain_pixels: bool = False
    init: str | None = None
    blip: str | None = None
    qformer: dict[str, int] = {}
    content_layers: tuple[int, ...] | None = None
    shares: tuple[NotNegative, ...] = (1, 1, 1)
    drop: tuple[Probability, Probability, Probability] = (0.15, 0.15, 0.0)
    caption_drop: Probability = 0.0

    _shares = field_validator("shares")(check_shares)


class DEADiffTask(Task):
    """Task "deadiff" of a recipe. Trains both Q-Formers, their queries and projections, and the image maps W_k', W_v'.
    The norms of the image tokens are frozen, as in the released optimiser, and so are UNet, text, autoencoder and image
    tower."""

    data_type = DEADiffData
    partly_used = True  # a batch of style pairs does not use the content Q-Former
    # Pairs of each kind for figures and for a sheet; sampling steps of its images.
    examples_count, steps = (32, 6), 20

    def __init__(self, data: DEADiffData):
        super().__init__()
        parts = load_base(data.model, "DEADiff")
        assert isinstance(parts.backbone, UNet)  # by load_base
        self.unet = parts.backbone.requires_grad_(False)
        self.vae: nn.Module = parts.vae.requires_grad_(False)
        self.text: nn.Module = parts.text.requires_grad_(False)
        self.parts, self.process, self.size = parts, parts.process, parts.size
        own = data.tower is None and isinstance(parts.image, TinyImage)
        self.tower = parts.image.patches() if own else image_tower(data.tower, data.plain_pixels)
        self.adapter = make_adapter(self.unet, self.tower, data.qformer, data.content_layers)
        if data.blip is not None:
            load_blip(self.adapter, Path(data.blip))
        if data.init is not None:
            load_adapter(self.adapter, Path(data.init))
        for reader in (self.adapter.style, self.adapter.content):
            reader.ln_vision.requires_grad_(False)
        self.shares, self.drop = data.shares, dict(zip(PAIR_KINDS, data.drop, strict=True))
        self.caption_drop = data.caption_drop
        self.kinds: list[PairKind] = [kind for kind, share in zip(PAIR_KINDS, data.shares, strict=True) if share]
        self.source = open_source(data.icons, data.pairs, self.kinds, ("train",), self.size, self.tower.size)
        self.held_out = None
        if data.icons is not None or data.held_out is not None:
            self.held_out = open_source(data.icons, data.held_out, self.kinds, ("combo",), self.size, self.tower.size)

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Paired:
        kind = rng.choices(PAIR_KINDS, weights=self.shares)[0]
        pairs = self.source.batch(rng, kind, size)
        # In reconstruction the reference is the target, and the caption is empty.
        captions = ["" if kind == "reconstruction" or rng.random() < self.caption_drop else c for c in pairs.captions]
        return Paired(kind, pairs.images, pairs.references, captions)

    def forward(self, batch: Paired, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x0, text, image = self.encoded(batch, generator)
        b, device = len(x0), x0.device
        t = torch.randint(self.process.num_train_timesteps, (b,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        kept = (torch.rand(b, generator=generator) >= self.drop[batch.kind]).to(device)
        with dropout_from(generator, device):
            tokens = self.shown(batch.kind, image, kept)
        loss = self.errors(x0, noise, t, text, tokens).mean()
        return loss, {f"loss_{batch.kind}": float(loss.detach())}

    def shown(self, kind: PairKind, image: Tensor, kept: Tensor | None = None) -> dict[Name, Tensor]:
        """The image tokens (B, T, width) that the network sees in a batch of a kind; zeros for rows not `kept`."""
        rows = 1 if kept is None else kept[:, None, None]
        return {name: self.adapter.ask(name, image) * rows for name in SHOWN[kind]}

    @torch.no_grad()
    def encoded(self, batch: Paired, generator: torch.Generator | None) -> tuple[Tensor, Text, Tensor]:
        """Latents (B, C, h, w), a sample of their posterior or its mode without a generator; text; image tokens."""
        x0 = latents_of(self.vae, batch.images, generator)
        return x0, self.text(batch.captions), self.tower(batch.references)

    def errors(self, x0: Tensor, noise: Tensor, t: Tensor, text: Text, tokens: Mapping[Name, Tensor]) -> Tensor:
        """Squared error of the noise (or of v), (B,), unweighted."""
        return errors(self.parts, x0, noise, t, text, [self.control(tokens, x0)])

    def control(self, tokens: Mapping[Name, Tensor], x: Tensor) -> DEADiffReference:
        """The control of a training step: tokens of some sets, zeros for the others."""
        return self.adapter.reference(tokens).prepare(run_of(self.parts, x))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out pairs: the error, and by how many percent it rises with another row's reference."""
        figures: dict[str, float] = {}
        for kind in self.kinds if self.held_out is not None else ():
            batch = to_device(self.examples(kind, self.examples_count[0]), self.device)
            x0, text, image = self.encoded(batch, None)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
            for share in (0.3, 0.7):
                t = torch.full((len(x0),), int(share * self.process.num_train_timesteps))
                right, wrong = (
                    float(self.errors(x0, noise, t, text, self.shown(kind, i)).mean())
                    for i in (image, image.roll(1, 0))
                )
                figures[f"{kind}_error_{share}"] = round(right, 4)
                figures[f"{kind}_wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
        return figures

    def examples(self, kind: PairKind, count: int) -> Paired:
        """Held-out pairs, the same at every validation."""
        assert self.held_out is not None
        pairs = self.held_out.batch(random.Random(0), kind, count)
        captions = [""] * count if kind == "reconstruction" else pairs.captions
        return Paired(kind, pairs.images, pairs.references, captions)

    def sheet(self) -> Image.Image | None:
        """References, images generated with them, and targets, for each kind."""
        if self.held_out is None:
            return None
        rows, labels = [], []
        for kind in self.kinds:
            batch = self.examples(kind, self.examples_count[1])
            rows += [to_images(x) for x in (batch.references, self.generate(batch), batch.images)]
            labels += [f"{kind}: reference", "generated", "real"]
        return contact_sheet(rows, labels)

    @torch.no_grad()
    def generate(self, batch: Paired, *, guidance: float = 5.0, seed: int = 0) -> Tensor:
        """Images (B, 3, H, W), with zero tokens and an empty prompt on the unconditional side."""
        image = self.tower(batch.references.to(self.device))
        control = self.adapter.reference(self.shown(batch.kind, image))
        how = {"num_inference_steps": self.steps, "guidance_scale": guidance, "seed": seed}
        pipe = Pipeline(self.parts)
        return pipe(batch.captions, "", controls=[control], sampler="ddim", output_type="pt", **how).images

    def export(self, folder: Path, card: dict) -> None:
        export_adapter(self.adapter, folder, card, model=self.parts.name, base=self.parts.hash)


@contextmanager
def dropout_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seeds the device's own generator, from which the Q-Formers' dropout samples, and restores it afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def make_adapter(unet: UNet, tower: ClipPatches, sizes: dict[str, int], layers: Sequence[int] | None) -> DEADiff:
    """An untrained adapter. Its Q-Formers fit tower and text and have the released sizes, except for `sizes`."""
    shapes = cross_shapes(unet)
    width = next(iter(shapes.values()))[0]
    small = {"vocabulary": OWN_VOCABULARY, "positions": 1}
    fitted = {"width": width, "image_width": tower.features, "heads": max(1, width // 64), "hidden": 4 * width}
    config = QFormerConfig(**{**fitted, **small, **sizes})
    words = OWN_WORDS if config.vocabulary == OWN_VOCABULARY else BERT_WORDS
    chosen = coarse_layers(len(shapes)) if layers is None else tuple(layers)
    return DEADiff.new(unet, config, tower, config=DEADiffConfig(chosen, words))


def image_tower(folder: str | None, plain_pixels: bool) -> ClipPatches:
    """A CLIP's image tower from its folder. plain_pixels: it reads [-1, 1], as the embedded CLIP does."""
    if folder is None:
        raise ValueError("tower must name the folder of a CLIP: download openai/clip-vit-large-patch14, for example.")
    vision = load_image_encoder(folder).model.vision_model
    return ClipPatches(vision, mean=(0.5,) * 3, std=(0.5,) * 3) if plain_pixels else ClipPatches(vision)


def load_adapter(adapter: DEADiff, source: Path) -> None:
    """Loads an earlier export (a folder or file) or the published checkpoint."""
    file = source / ADAPTER if source.is_dir() else source
    tensors = published.adapter_tensors(read_tensors(file), file)
    kept = {name: value.float() for name, value in tensors.items() if not name.startswith("tower.")}
    recorded = own_fields(read_metadata(file))
    layers = recorded.get("content_layers", list(adapter.config.content_layers))
    if tuple(layers) != adapter.config.content_layers:
        raise ValueError(f"{file} has content_layers {layers}; the recipe has {list(adapter.config.content_layers)}.")
    load_strict(adapter, kept, source=file)


def load_blip(adapter: DEADiff, folder: Path) -> None:
    """Loads both Q-Formers and projections from BLIP-Diffusion's release, the paper's initialisation."""
    tensors = published.blip_diffusion(
        read_tensors(folder / "blip_model" / "blip_weight.pt"), read_tensors(folder / "proj_layer" / "proj_weight.pt")
    )
    for reader in (adapter.style, adapter.content):
        load_strict(reader, tensors, source=folder)
