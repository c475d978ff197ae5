"""Training of IP-Adapter on a frozen UNet (arXiv:2308.06721, sections 3.2 and 4.1; tencent-ailab/IP-Adapter,
tutorial_train.py): the projector and K', V', which start as the text's K, V."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from condit.controls.control import Control
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import HEAD_DIM, ImageProjection, Resampler
from condit.data.grouped import PAIR_KINDS, PairKind
from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.drawing.pipeline import Pipeline
from condit.encoders.clip_patches import CLIP_MEAN, CLIP_STD
from condit.encoders.image import CLIPImage, TinyImage
from condit.training.denoising import errors, latents_of, load_base
from condit.training.export import ADAPTER, export_adapter
from condit.training.loop import Task, to_device
from condit.training.paired import Paired, open_source
from condit.weights.clip_towers import load_image_encoder
from condit.weights.files import load_strict, read_tensors
from condit.weights.folders import floats
from condit.weights.latent_models import LatentParts

Projector = Literal["global", "plus"]
TOKENS: dict[str, int] = {"global": 4, "plus": 16}  # of the published files


@dataclass
class Shown:
    """Pairs; `kept` (B,) is 0 where the row is shown no reference."""

    pairs: Paired
    kept: Tensor


class IPAdapterTask(Task):
    """model: a Stable Diffusion, or the embedded UNet. image_encoder: the folder of a CLIP; None: the model's own.

    projector: "global" reads the pooled embedding, "plus" the last but one layer's states. where: only these layers.
    shares: how often a batch is of style pairs, content pairs, reconstruction; published is the last alone. drop: how
    often a row loses its reference, its words, both. noise_offset: of SDXL's training, on the mean of each channel.
    """

    looked = (64, 8)  # pairs for figures and for a sheet

    def __init__(
        self,
        model: str,
        *,
        icons: str | None = None,
        pairs: str | None = None,
        held_out: str | None = None,
        image_encoder: str | None = None,
        projector: Projector = "global",
        tokens: int | None = None,
        where: str | Sequence[str] | None = None,
        init: str | None = None,
        shares: Sequence[float] = (0, 0, 1),
        drop: Sequence[float] = (0.05, 0.05, 0.05),
        noise_offset: float = 0.0,
    ):
        super().__init__()
        if len(shares) != 3 or min(shares) < 0 or not sum(shares):
            raise ValueError(f"shares: three numbers >= 0, not all 0 (style, content, reconstruction); found {shares}.")
        if len(drop) != 3 or min(drop) < 0 or sum(drop) > 1:
            raise ValueError(f"drop: three probabilities that sum to 1 at most (image, text, both); found {drop}.")
        self.parts = load_base(model, "IP-Adapter")
        self.unet: nn.Module = self.parts.backbone.requires_grad_(False)
        self.vae: nn.Module = self.parts.vae.requires_grad_(False)
        self.text: nn.Module = self.parts.text.requires_grad_(False)  # type: ignore[union-attr]
        self.encoder = find_encoder(self.parts, image_encoder, projector)
        chosen = tuple([where] if isinstance(where, str) else where) if where is not None else None
        self.ip = new_adapter(self.unet, self.encoder, projector, tokens or TOKENS[projector], chosen)
        if init is not None:
            load_strict(self.ip, floats(read_tensors(Path(init) / ADAPTER)), source=init)
        self.shares, self.drop, self.noise_offset = list(shares), list(drop), noise_offset
        self.kinds: list[PairKind] = [kind for kind, share in zip(PAIR_KINDS, shares, strict=True) if share]
        side = self.encoder.size.side if isinstance(self.encoder, CLIPImage) else self.parts.size[0]
        self.source = open_source(icons, pairs, self.kinds, ("train",), self.parts.size, side)
        self.held_out = None
        if icons is not None or held_out is not None:
            self.held_out = open_source(icons, held_out, self.kinds, ("combo",), self.parts.size, side)

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Shown:
        kind = rng.choices(PAIR_KINDS, weights=self.shares)[0]
        found, kept = self.source.batch(rng, kind, size), []
        image, text, _ = self.drop
        for i in range(size):
            r = rng.random()  # one draw: no reference, no words, neither
            kept.append(not (r < image or image + text <= r < sum(self.drop)))
            if image <= r < sum(self.drop):
                found.captions[i] = ""
        return Shown(found, torch.tensor(kept, dtype=torch.float32))

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
        """What the projector reads of references (B, 3, S, S) in [-1, 1]; where not `kept`, what stands for none:
        zeros, or behind a reader of states, those of a picture of zeros after normalising."""
        return read_features(self.encoder, references, kept, self.ip.config.feature)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out pairs: the error, and how much it rises with another row's reference, and with none, in %."""
        found: dict[str, float] = {}
        for kind in self.kinds if self.held_out is not None else ():
            batch: Paired = to_device(self.examples(kind, self.looked[0]), self.device)
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
                found[f"{kind}_error_{share}"] = round(right, 4)
                found[f"{kind}_wrong_reference_{share}"] = round(100 * (wrong / right - 1), 1)
                found[f"{kind}_no_reference_{share}"] = round(100 * (without / right - 1), 1)
        return found

    def examples(self, kind: PairKind, count: int) -> Paired:
        """The same held-out pairs at every look."""
        assert self.held_out is not None
        return self.held_out.batch(random.Random(0), kind, count)

    def sheet(self) -> Image.Image | None:
        """References, what is drawn with and without them, and the real targets, for each kind."""
        if self.held_out is None:
            return None
        rows, labels, pipe = [], [], Pipeline(self.parts)
        for kind in self.kinds:
            batch: Paired = to_device(self.examples(kind, self.looked[1]), self.device)
            ones = torch.ones(len(batch.captions), device=self.device)
            none, shown = self.control(batch, 0 * ones), self.control(batch, ones)
            drawn = [pipe(batch.captions, "", controls=[c], seed=0).images for c in (none, shown)]
            rows += [to_images(batch.references), *drawn, to_images(batch.images)]
            labels += [f"{kind}: reference", "no reference", "drawn", "real"]
        return contact_sheet(rows, labels)

    def control(self, batch: Paired, kept: Tensor) -> Control:
        none = self.features(batch.references, 0 * kept)[:1]
        return self.acting(self.features(batch.references, kept), empty=none)

    def acting(self, features: Tensor, *, empty: Tensor | None = None) -> Control:
        """How features enter the network; ablations let them enter otherwise. empty: those of no reference."""
        return self.ip.reference(features, empty=empty)

    def export(self, folder: Path, card: dict) -> None:
        export_adapter(self.ip, folder, card, base=self.parts.hash)


@torch.no_grad()
def read_features(encoder: TinyImage | CLIPImage, references: Tensor, kept: Tensor, feature: str) -> Tensor:
    """See `IPAdapterTask.features`; feature: "embeds" or "hidden"."""
    pixels = references
    if isinstance(encoder, CLIPImage):
        mean, std = (references.new_tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
        pixels = ((references + 1) / 2 - mean) / std
    if feature == "hidden":
        return encoder.hidden(pixels * kept[:, None, None, None]).float()
    found = encoder.embeds(pixels).float() if isinstance(encoder, CLIPImage) else encoder(pixels)
    return found * kept[:, None]


def find_encoder(parts: LatentParts, folder: str | None, projector: str) -> TinyImage | CLIPImage:
    """The image encoder, frozen. ValueError where there is none, or where it has no states for "plus"."""
    if projector not in TOKENS:
        raise ValueError(f"projector must be one of {', '.join(TOKENS)}; found {projector!r}.")
    found = parts.image if folder is None else load_image_encoder(folder)
    if found is None:
        raise ValueError(f"{parts.name} has no image encoder: image_encoder must name the folder of a CLIP.")
    if projector == "plus" and not hasattr(found, "states"):
        raise ValueError(f'"plus" reads the states of a CLIP, which image_encoder must name; {parts.name} has vectors.')
    return found.requires_grad_(False)


def new_adapter(
    unet: nn.Module,
    encoder: TinyImage | CLIPImage,
    projector: str,
    tokens: int,
    where: tuple[str, ...] | None,
    *,
    depth: int = 4,
) -> IPAdapter:
    """An untrained adapter. A "plus" projector has the published sizes: as wide as the text, 1280 at most, heads of 64,
    `depth` layers."""
    width = unet.config.cross_attention_dim  # type: ignore[union-attr]
    assert isinstance(width, int)
    if projector == "global":
        made: nn.Module = ImageProjection(encoder.features, width, tokens)
        return IPAdapter.new(unet, IPConfig(encoder.features, tokens, width), projector=made, where=where)
    hidden, heads = encoder.states, max(1, min(width, 1280) // HEAD_DIM)
    dim = min(width, 1280)
    sizes = {"inner": heads * HEAD_DIM, "heads": heads, "depth": depth, "hidden": 4 * dim, "queries": tokens}
    made = Resampler(hidden, dim, width, **sizes)
    config = IPConfig(hidden, tokens, width, feature="hidden")
    return IPAdapter.new(unet, config, projector=made, where=where)
