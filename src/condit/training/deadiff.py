"""Training of DEADiff (arXiv:2403.06951, section 3) on a frozen Stable Diffusion: style pairs, content pairs and
reconstruction, one of the three a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

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
from condit.training.loop import Task, to_device
from condit.training.paired import Paired, open_source
from condit.weights import deadiff as published
from condit.weights.clip_towers import load_image_encoder
from condit.weights.files import load_strict, own_fields, read_metadata, read_tensors

# What a batch of each kind shows the network.
SHOWN: dict[PairKind, tuple[Name, ...]] = {
    "style": ("style",),
    "content": ("content",),
    "reconstruction": ("style", "content"),
}
# An untrained Q-Former needs no more words than it is asked; row 0 is padding, which never learns.
OWN_WORDS: dict[str, tuple[int, ...]] = {"style": (1,), "content": (2,)}
OWN_VOCABULARY = 3


class DEADiffTask(Task):
    """What is trained: both Q-Formers, their queries and projections, and the image maps W_k', W_v'. The norms of the
    image tokens stay as they are, as in the released optimiser; so do UNet, text, autoencoder and image tower.

    tower: the folder of a CLIP; None: the embedded model's own. shares: how often a batch is of style pairs, content
    pairs, reconstruction. drop: how often a sample of each loses its tokens, which are then zeros. caption_drop: how
    often a caption is left empty (not in the released code).
    """

    partly_used = True  # a batch of style pairs never asks for content
    looked, steps = (32, 6), 20  # pairs of each kind for figures and for a sheet; steps of its pictures

    def __init__(
        self,
        model: str,
        *,
        icons: str | None = None,
        pairs: str | None = None,
        held_out: str | None = None,
        tower: str | None = None,
        plain_pixels: bool = False,
        init: str | None = None,
        blip: str | None = None,
        qformer: dict[str, int] | None = None,
        content_layers: Sequence[int] | None = None,
        shares: Sequence[float] = (1, 1, 1),
        drop: Sequence[float] = (0.15, 0.15, 0.0),
        caption_drop: float = 0.0,
    ):
        super().__init__()
        check_odds(shares, drop, caption_drop)
        parts = load_base(model, "DEADiff")
        self.unet: nn.Module = parts.backbone.requires_grad_(False)
        self.vae: nn.Module = parts.vae.requires_grad_(False)
        self.text: nn.Module = parts.text.requires_grad_(False)
        self.parts, self.process, self.size = parts, parts.process, parts.size
        own = tower is None and isinstance(parts.image, TinyImage)
        self.tower = parts.image.patches() if own else image_tower(tower, plain_pixels)
        self.adapter = make_adapter(self.unet, self.tower, qformer or {}, content_layers)
        if blip is not None:
            load_blip(self.adapter, Path(blip))
        if init is not None:
            load_adapter(self.adapter, Path(init))
        for reader in (self.adapter.style, self.adapter.content):
            reader.ln_vision.requires_grad_(False)
        self.shares, self.drop, self.caption_drop = list(shares), dict(zip(PAIR_KINDS, drop, strict=True)), caption_drop
        wanted: list[PairKind] = [kind for kind, share in zip(PAIR_KINDS, shares, strict=True) if share]
        self.source = open_source(icons, pairs, wanted, ("train",), self.size, self.tower.size)
        self.held_out = None
        if icons is not None or held_out is not None:
            self.held_out = open_source(icons, held_out, wanted, ("combo",), self.size, self.tower.size)
        self.kinds = wanted

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Paired:
        kind = rng.choices(PAIR_KINDS, weights=self.shares)[0]
        found = self.source.batch(rng, kind, size)
        # In reconstruction the reference says all, so no words are given.
        told = ["" if kind == "reconstruction" or rng.random() < self.caption_drop else c for c in found.captions]
        return Paired(kind, found.images, found.references, told)

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
        """The answers (B, T, width) that a batch of a kind shows the network; zeros for rows that are not `kept`."""
        rows = 1 if kept is None else kept[:, None, None]
        return {name: self.adapter.ask(name, image) * rows for name in SHOWN[kind]}

    @torch.no_grad()
    def encoded(self, batch: Paired, generator: torch.Generator | None) -> tuple[Tensor, Text, Tensor]:
        """Latents (B, C, h, w), drawn from their posterior, or its mode without a generator; text; image tokens."""
        x0 = latents_of(self.vae, batch.images, generator)
        return x0, self.text(batch.captions), self.tower(batch.references)

    def errors(self, x0: Tensor, noise: Tensor, t: Tensor, text: Text, tokens: Mapping[Name, Tensor]) -> Tensor:
        """Squared error of the noise (or of v), (B,): plain, without weights."""
        return errors(self.parts, x0, noise, t, text, [self.control(tokens, x0)])

    def control(self, tokens: Mapping[Name, Tensor], x: Tensor) -> DEADiffReference:
        """The control of a training step: tokens of some sets, zeros for the others."""
        return self.adapter.reference(tokens).prepare(run_of(self.parts, x))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out pairs: the error, and how much it rises with another row's reference, in %."""
        found: dict[str, float] = {}
        for kind in self.kinds if self.held_out is not None else ():
            batch: Paired = to_device(self.examples(kind, self.looked[0]), self.device)
            x0, text, image = self.encoded(batch, None)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
            for share in (0.3, 0.7):
                t = torch.full((len(x0),), int(share * self.process.num_train_timesteps))
                right, wrong = (
                    float(self.errors(x0, noise, t, text, self.shown(kind, i)).mean())
                    for i in (image, image.roll(1, 0))
                )
                found[f"{kind}_error_{share}"] = round(right, 4)
                found[f"{kind}_wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
        return found

    def examples(self, kind: PairKind, count: int) -> Paired:
        """The same held-out pairs at every look."""
        assert self.held_out is not None
        found = self.held_out.batch(random.Random(0), kind, count)
        told = [""] * count if kind == "reconstruction" else found.captions
        return Paired(kind, found.images, found.references, told)

    def sheet(self) -> Image.Image | None:
        """References, what is drawn from them, and the real targets, for each kind."""
        if self.held_out is None:
            return None
        rows, labels = [], []
        for kind in self.kinds:
            batch = self.examples(kind, self.looked[1])
            rows += [to_images(x) for x in (batch.references, self.draw(batch), batch.images)]
            labels += [f"{kind}: reference", "drawn", "real"]
        return contact_sheet(rows, labels)

    @torch.no_grad()
    def draw(self, batch: Paired, *, guidance: float = 5.0, seed: int = 0) -> Tensor:
        """Pictures (B, 3, H, W), with zero tokens and no words on the unconditional side."""
        image = self.tower(batch.references.to(self.device))
        control = self.adapter.reference(self.shown(batch.kind, image))
        how = {"num_inference_steps": self.steps, "guidance_scale": guidance, "seed": seed}
        pipe = Pipeline(self.parts)
        return pipe(batch.captions, "", controls=[control], sampler="ddim", output_type="pt", **how).images

    def export(self, folder: Path, card: dict) -> None:
        export_adapter(self.adapter, folder, card, base=self.parts.hash)


@contextmanager
def dropout_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """The Q-Formers' dropout draws from the device's own generator: it is seeded from ours, and left as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def check_odds(shares: Sequence[float], drop: Sequence[float], caption_drop: float) -> None:
    if len(shares) != 3 or min(shares) < 0 or not sum(shares):
        raise ValueError(
            f"shares must be three numbers >= 0, not all 0 (style, content, reconstruction); found {shares}."
        )
    if len(drop) != 3 or not all(0 <= p <= 1 for p in (*drop, caption_drop)):
        raise ValueError(f"drop must be three probabilities, caption_drop one; found {drop}, {caption_drop}.")


def make_adapter(unet: Any, tower: ClipPatches, sizes: dict[str, int], layers: Sequence[int] | None) -> DEADiff:
    """An untrained adapter whose Q-Formers have the released sizes, but for `sizes`, and fit tower and text."""
    shapes = cross_shapes(unet)
    width = next(iter(shapes.values()))[0]
    small = {"vocabulary": OWN_VOCABULARY, "positions": 1}
    fitted = {"width": width, "image_width": tower.features, "heads": max(1, width // 64), "hidden": 4 * width}
    config = QFormerConfig(**{**fitted, **small, **sizes})
    words = OWN_WORDS if config.vocabulary == OWN_VOCABULARY else BERT_WORDS
    chosen = coarse_layers(len(shapes)) if layers is None else tuple(layers)
    return DEADiff.new(unet, config, tower, config=DEADiffConfig(chosen, words))


def image_tower(folder: str | None, plain_pixels: bool) -> ClipPatches:
    """A CLIP's image tower from its folder. plain_pixels: it reads [-1, 1] as it is, as the embedded CLIP does."""
    if folder is None:
        raise ValueError("tower must name the folder of a CLIP, such as openai/clip-vit-large-patch14 downloaded.")
    vision = load_image_encoder(folder).model.vision_model
    return ClipPatches(vision, mean=(0.5,) * 3, std=(0.5,) * 3) if plain_pixels else ClipPatches(vision)


def load_adapter(adapter: DEADiff, source: Path) -> None:
    """To go on from an earlier export (a folder or file), or from the published checkpoint."""
    file = source / ADAPTER if source.is_dir() else source
    tensors = published.adapter_tensors(read_tensors(file), file)
    kept = {name: value.float() for name, value in tensors.items() if not name.startswith("tower.")}
    told = own_fields(read_metadata(file))
    layers = told.get("content_layers", list(adapter.config.content_layers))
    if tuple(layers) != adapter.config.content_layers:
        raise ValueError(f"{file} has content_layers {layers}; the recipe {list(adapter.config.content_layers)}.")
    load_strict(adapter, kept, source=file)


def load_blip(adapter: DEADiff, folder: Path) -> None:
    """Both Q-Formers and projections from BLIP-Diffusion's release, which the paper starts from."""
    tensors = published.blip_diffusion(
        read_tensors(folder / "blip_model" / "blip_weight.pt"), read_tensors(folder / "proj_layer" / "proj_weight.pt")
    )
    for reader in (adapter.style, adapter.content):
        load_strict(reader, tensors, source=folder)
