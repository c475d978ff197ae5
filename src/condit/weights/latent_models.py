"""What a `LatentPipeline` is made of, whatever its network: a UNet, a transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from condit.backbones.unet import UNet
from condit.controls.control import Control
from condit.diffusion.vp import Process, Solver
from condit.encoders.text import Text
from condit.nn.lora import LowRank


@dataclass(frozen=True)
class Frame:
    """The sizes that a network may read, in pixels (height, width): of the image, of the original before it was
    cropped, the corner (top, left) of the crop, and the target size (SDXL, arXiv:2307.01952, section 2.2)."""

    size: tuple[int, int]
    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


def rows_of(frame: Frame | Sequence[Frame], count: int) -> Sequence[Frame]:
    """A frame for each of `count` rows."""
    return [frame] * count if isinstance(frame, Frame) else frame


class LatentNetwork(Protocol):
    """A network with its text: latents (B, C, h, w), timesteps (B,) -> prediction (B, latent channels, h, w)."""

    def __call__(self, x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor: ...


# tell(backbone, text, frame): the network of a run. What does not change from step to step is computed here. One frame
# for all rows, or one a row.
Tell = Callable[[Any, Text, Frame | Sequence[Frame]], LatentNetwork]


@dataclass(frozen=True)
class LatentParts:
    """A model's parts and defaults. solver: None where condit does not have the published scheduler. zero_negative:
    without a negative prompt the text is zeros, not that of "" (SDXL). image: an image encoder or None."""

    name: str
    hash: str
    backbone: nn.Module
    text: Callable[..., Text]
    vae: Any
    image: Any
    process: Process
    solver: Solver | None
    size: tuple[int, int]
    steps: int
    guidance: float
    tell: Tell
    zero_negative: bool = False


def tell_unet(unet: UNet, text: Text, frame: Frame | Sequence[Frame]) -> LatentNetwork:
    """Stable Diffusion's UNet with a text, whose keys and values are projected once a run."""
    sizes = None
    if unet.config.addition_embed_type is not None:
        rows = [[*f.original, *f.crop, *f.target] for f in rows_of(frame, len(text.tokens))]
        sizes = torch.tensor(rows, device=text.tokens.device)
    pooled = None if sizes is None else text.pooled
    keys_values = unet.text_keys_values(text.tokens)

    def network(x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor:
        projected = keys_values if lora is None else text.tokens  # a LoRA changes the projections too, step by step
        return unet(x, t, projected, pooled=pooled, sizes=sizes, lora=lora, controls=controls)

    return network
