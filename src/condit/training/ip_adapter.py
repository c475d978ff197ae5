"""Training of IP-Adapter on a frozen UNet (arXiv:2308.06721, sections 3.2 and 4.1; tencent-ailab/IP-Adapter,
tutorial_train.py). Trains the projector and K', V', which are initialised with the text's K, V."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.controls.control import Control
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import HEAD_DIM, IdentityProjection, ImageProjection, Resampler
from condit.controls.ip_reference import WithLoRA
from condit.data.grouped import PAIR_KINDS, PairKind
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.drawing.pipeline import Pipeline
from condit.encoders.clip_patches import CLIP_MEAN, CLIP_STD
from condit.encoders.image import CLIPImage, TinyImage
from condit.nn.lora import LoRA, linear_shapes, weighted
from condit.training.denoising import errors, latents_of, load_base
from condit.training.export import ADAPTER, export_adapter
from condit.training.fields import Count, Data, NotNegative, Probability, check_shares
from condit.training.loop import Task, to_device
from condit.training.paired import Faces, Paired, open_source
from condit.weights.clip_towers import load_image_encoder
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit.weights.latent_models import LatentParts

Projector = Literal["global", "plus", "face"]
TOKENS: dict[str, int] = {"global": 4, "plus": 16, "face": 4}  # of the published files


@dataclass
class Shown:
    """Pairs; `kept` (B,) is 0 for rows without a reference."""

    pairs: Paired
    kept: Tensor


class IPAdapterData(Data):
    """model: a Stable Diffusion, or the embedded UNet. Pairs come from `icons` or from `pairs` (a folder or tars).

    held_out: pairs for validation. image_encoder: the folder of a CLIP; None: the model's own. projector: "global"
    reads the pooled embedding, "plus" the states of the penultimate layer, "face" (FaceID) the vectors in the file
    `faces`, with a LoRA of `lora_rank` on all attention layers (None: without). tokens: None: as published. where:
    patterns of the layers that get K', V'; None: all. init: an earlier export. shares: how often a batch is of style
    pairs, content pairs, reconstruction; published is reconstruction alone. drop: how often a row loses its reference,
    its caption, both. noise_offset: as in SDXL's training, on the mean of each channel.
    """

    model: str
    icons: str | None = None
    pairs: str | None = None
    held_out: str | None = None
    image_encoder: str | None = None
    projector: Projector = "global"
    faces: str | None = None
    lora_rank: Count | None = None
    tokens: Count | None = None
    where: str | tuple[str, ...] | None = None
    init: str | None = None
    shares: tuple[NotNegative, ...] = (0, 0, 1)
    drop: tuple[Probability, Probability, Probability] = (0.05, 0.05, 0.05)
    noise_offset: NotNegative = 0.0

    _shares = field_validator("shares")(check_shares)

    @model_validator(mode="after")
    def _of_faces(self) -> IPAdapterData:
        if (self.projector == "face") != (self.faces is not None):
            raise ValueError('projector = "face" and faces, the file of their vectors, need each other.')
        if self.faces is None and self.lora_rank is not None:
            raise ValueError('lora_rank is for projector = "face".')
        if self.faces is not None and self.init is not None:
            raise ValueError('init is not read for projector = "face".')
        return self

    @field_validator("drop")
    @classmethod
    def _exclusive(cls, drop: tuple[float, float, float]) -> tuple[float, float, float]:
        if sum(drop) > 1:
            raise ValueError(f"drop must be probabilities that sum to 1 at most (image, text, both); found {drop}.")
        return drop


class IPAdapterTask(Task):
    """Task "ip-adapter" of a recipe."""

    data_type = IPAdapterData
    examples_count = (64, 8)  # pairs for figures and for a sheet

    def __init__(self, data: IPAdapterData):
        super().__init__()
        parts = load_base(data.model, "IP-Adapter")
        assert isinstance(parts.backbone, UNet)  # by load_base
        self.parts, self.unet = parts, parts.backbone.requires_grad_(False)
        self.vae: nn.Module = parts.vae.requires_grad_(False)
        self.text: nn.Module = parts.text.requires_grad_(False)
        faces = None if data.faces is None else Faces.read(data.faces)
        encoder = find_encoder(parts, data.image_encoder, data.projector) if faces is None else None
        where = (data.where,) if isinstance(data.where, str) else data.where
        tokens = data.tokens or TOKENS[data.projector]
        if encoder is not None:
            self.ip = new_adapter(self.unet, encoder, data.projector, tokens, where)
        elif faces is not None:
            self.ip = new_face_adapter(self.unet, faces.width, tokens, where, data.lora_rank)
        self.encoder = encoder
        if data.init is not None:
            load_strict(self.ip, floats(read_tensors(Path(data.init) / ADAPTER)), source=data.init)
        self.shares, self.drop, self.noise_offset = data.shares, data.drop, data.noise_offset
        self.kinds: list[PairKind] = [kind for kind, share in zip(PAIR_KINDS, data.shares, strict=True) if share]
        side = self.encoder.size.side if isinstance(self.encoder, CLIPImage) else parts.size[0]
        self.source = open_source(data.icons, data.pairs, self.kinds, ("train",), parts.size, side, faces)
        self.held_out = None
        if data.icons is not None or data.held_out is not None:
            self.held_out = open_source(data.icons, data.held_out, self.kinds, ("combo",), parts.size, side, faces)

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Shown:
        kind = rng.choices(PAIR_KINDS, weights=self.shares)[0]
        pairs, kept = self.source.batch(rng, kind, size), []
        image, text, _ = self.drop
        for i in range(size):
            r = rng.random()  # one number decides: no reference, no caption, neither
            kept.append(not (r < image or image + text <= r < sum(self.drop)))
            if image <= r < sum(self.drop):
                pairs.captions[i] = ""
        return Shown(pairs, torch.tensor(kept, dtype=torch.float32))

    def forward(self, batch: Shown, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0 = latents_of(self.vae, batch.pairs.images, generator)
            text, features = self.text(batch.pairs.captions), self.features(batch.pairs.references, batch.kept)
        t = torch.randint(self.parts.process.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
        controls = [self.acting(features)]
        loss = errors(self.parts, x0, noise.to(x0.device), t, text, controls, batch.pairs.frames).mean()
        return loss, {f"loss_{batch.pairs.kind}": float(loss.detach())}

    @torch.no_grad()
    def features(self, references: Tensor, kept: Tensor) -> Tensor:
        """The projector's input for references (B, 3, S, S) in [-1, 1], or faces (B, E). Rows that are not `kept`
        have none: a zero embedding, or the states of an image of zeros after normalisation."""
        if self.encoder is None:
            return references * kept[:, None]
        return read_features(self.encoder, references, kept, self.ip.config.feature)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out pairs: the error, and by how many percent it rises with another row's reference and with none."""
        figures: dict[str, float] = {}
        for kind in self.kinds if self.held_out is not None else ():
            batch = to_device(self.examples(kind, self.examples_count[0]), self.device)
            x0, text = latents_of(self.vae, batch.images, None), self.text(batch.captions)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
            ones = torch.ones(len(x0), device=x0.device)
            own, none = self.features(batch.references, ones), self.features(batch.references, 0 * ones)
            for share in (0.3, 0.7, 0.9):
                t = torch.full((len(x0),), int(share * self.parts.process.num_train_timesteps))
                right, wrong, without = (
                    float(errors(self.parts, x0, noise, t, text, [self.acting(f)], batch.frames).mean())
                    for f in (own, own.roll(1, 0), none)
                )
                figures[f"{kind}_error_{share}"] = round(right, 4)
                figures[f"{kind}_wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
                figures[f"{kind}_no_reference_{share}"] = round(100 * (without / right - 1), 1)
        return figures

    def examples(self, kind: PairKind, count: int) -> Paired:
        """Held-out pairs, the same at every validation."""
        assert self.held_out is not None
        return self.held_out.batch(random.Random(0), kind, count)

    def sheet(self) -> Image.Image | None:
        """References, images generated without and with them, and targets, for each kind."""
        if self.held_out is None:
            return None
        rows, labels, pipe = [], [], Pipeline(self.parts)
        for kind in self.kinds:
            batch = to_device(self.examples(kind, self.examples_count[1]), self.device)
            ones = torch.ones(len(batch.captions), device=self.device)
            none, shown = self.control(batch, 0 * ones), self.control(batch, ones)
            generated = [pipe(batch.captions, "", controls=[c], seed=0).images for c in (none, shown)]
            shown = to_images(batch.images if self.encoder is None else batch.references)  # a face has no picture
            rows += [shown, *generated, to_images(batch.images)]
            labels += [f"{kind}: reference", "no reference", "generated", "real"]
        return contact_sheet(rows, labels)

    def control(self, batch: Paired, kept: Tensor) -> Control:
        none = self.features(batch.references, 0 * kept)[:1]
        return self.acting(self.features(batch.references, kept), empty=none)

    def acting(self, features: Tensor, *, empty: Tensor | None = None) -> Control:
        """The control that passes features to the network; ablations override it. empty: the features without a
        reference."""
        made = self.ip.reference(features, empty=empty)
        return made if self.ip.lora is None else WithLoRA(made, self.ip, weighted(self.ip.lora, 1.0))

    def export(self, folder: Path, card: dict) -> None:
        export_adapter(self.ip, folder, card, model=self.parts.name, base=self.parts.hash)


def new_face_adapter(unet: UNet, width: int, tokens: int, where: tuple[str, ...] | None, rank: int | None) -> IPAdapter:
    """An untrained FaceID for vectors (width,), with the published sizes; rank: of its LoRA, None: without."""
    dim = unet.config.cross_attention_dim
    projector = IdentityProjection(width, 2 * width, dim, tokens)
    adapter = IPAdapter.new(unet, IPConfig(width, tokens, dim, feature="identity"), projector=projector, where=where)
    if rank is not None:
        adapter.attentions = tuple(site.path for site in unet.sites)
        parts = ("to_q", "to_k", "to_v", "to_out.0")
        adapter.lora = LoRA(linear_shapes(unet, [f"{path}.{p}" for path in adapter.attentions for p in parts]), rank)
    return adapter


@torch.no_grad()
def read_features(encoder: TinyImage | CLIPImage, references: Tensor, kept: Tensor, feature: str) -> Tensor:
    """See `IPAdapterTask.features`. feature: "embeds" or "hidden"."""
    pixels = references
    if isinstance(encoder, CLIPImage):
        mean, std = (references.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
        pixels = ((references + 1) / 2 - mean) / std
    if feature == "hidden":
        return encoder.hidden(pixels * kept[:, None, None, None]).float()
    embeds = encoder.embeds(pixels).float() if isinstance(encoder, CLIPImage) else encoder(pixels)
    return embeds * kept[:, None]


def find_encoder(parts: LatentParts, folder: str | None, projector: Projector) -> TinyImage | CLIPImage:
    """The image encoder, frozen. Raises ValueError without one, or if it has no states for "plus"."""
    encoder = parts.image if folder is None else load_image_encoder(folder)
    if encoder is None:
        raise ValueError(f"{parts.name} has no image encoder: image_encoder must name the folder of a CLIP.")
    if projector == "plus" and not hasattr(encoder, "states"):
        raise ValueError(
            f'"plus" reads the states of a CLIP, and the encoder of {parts.name} has none: image_encoder must name the '
            "folder of a CLIP."
        )
    return encoder.requires_grad_(False)


def new_adapter(
    unet: UNet,
    encoder: TinyImage | CLIPImage,
    projector: str,
    tokens: int,
    where: tuple[str, ...] | None,
    *,
    depth: int = 4,
) -> IPAdapter:
    """An untrained adapter. A "plus" projector has the published sizes: the width of the text, 1280 at most, heads of
    64, `depth` layers."""
    width = unet.config.cross_attention_dim
    if projector == "global":
        global_projector = ImageProjection(encoder.features, width, tokens)
        return IPAdapter.new(unet, IPConfig(encoder.features, tokens, width), projector=global_projector, where=where)
    hidden, heads = encoder.states, max(1, min(width, 1280) // HEAD_DIM)
    dim = min(width, 1280)
    sizes = {"inner": heads * HEAD_DIM, "heads": heads, "depth": depth, "hidden": 4 * dim, "queries": tokens}
    config = IPConfig(hidden, tokens, width, feature="hidden")
    return IPAdapter.new(unet, config, projector=Resampler(hidden, dim, width, **sizes), where=where)
