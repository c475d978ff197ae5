"""Image to image and inpainting: what a run of a `LatentPipeline` starts from, and what stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condit.controls.control import match_batch
from condit.data.images import ImageSource
from condit.diffusion.gaussian_samplers import draw
from condit.diffusion.vp import Path, add_noise

if TYPE_CHECKING:
    from condit.drawing.latent_pipeline import LatentPipeline

Images = ImageSource | Sequence[ImageSource]


@dataclass(frozen=True)
class Start:
    """What a run starts from, in latents (B, C, h, w): x at the first level; with a picture to repaint, the latents
    `kept` where `mask` (B, 1, h, w) is 0, and the `noise` they stand in; `beside`: channels that the network reads
    beside x, of an inpainting model."""

    x: Tensor
    noise: Tensor
    kept: Tensor | None = None
    mask: Tensor | None = None
    beside: Tensor | None = None


def check_picture(pipe: LatentPipeline, image: Images | None, mask: Images | None, strength: float) -> None:
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1]; found {strength}.")
    if mask is not None and image is None:
        raise ValueError("mask_image says where to repaint: give image= too.")
    if image is None and strength != 1:
        raise ValueError(f"strength {strength} says how much of a picture to change: give image= too.")
    if pipe.repaints and mask is None:
        raise ValueError(f"{pipe.name} is an inpainting model: give image= and mask_image=, white where to paint.")


def skipped(steps: int, strength: float) -> int:
    """How many steps image-to-image leaves out."""
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise ValueError(f"strength {strength} of {steps} steps leaves none. Raise one of them.")
    return steps - kept


def start_of(
    pipe: LatentPipeline,
    image: Images | None,
    mask_image: Images | None,
    strength: float,
    size: tuple[int, int],
    path: Path,
    generators: list[torch.Generator],
    latents: Tensor | None,
) -> Start:
    """The first latents. Each generator gives, in this order: the picture's posterior, the noise, the posterior of
    what is around the mask."""
    batch, shape = len(generators), (pipe.channels, size[0] // pipe.pixels, size[1] // pipe.pixels)
    picture = mask = kept = small = beside = None
    if image is not None:
        picture = match_batch(pipe.read_images(image, None, size), batch, "image")
    if mask_image is not None:
        white = (pipe.read_images(mask_image, None, size)[:, :1] + 1) / 2
        mask = match_batch((white >= 0.5).float(), batch, "mask_image")
        small = torch.nn.functional.interpolate(mask, size=shape[1:])
    if picture is not None and not (pipe.repaints and strength == 1):
        kept = pipe.encode_images(picture, generators)
    if latents is None:
        noise = draw(shape, generators).to(pipe.device)
    elif tuple(latents.shape) != (batch, *shape):
        raise ValueError(f"latents must be noise of shape {(batch, *shape)}; found {tuple(latents.shape)}.")
    else:
        noise = latents.float().to(pipe.device)
    if pipe.repaints and picture is not None and mask is not None and small is not None:
        beside = torch.cat([small, pipe.encode_images(picture * (1 - mask), generators)], 1)
    # A picture to repaint at full strength is drawn from noise alone, as diffusers does.
    if kept is None or (mask is not None and strength == 1):
        x = path.start * noise
    else:
        x = add_noise(kept, noise, path.level[0])
    return Start(x, noise, None if pipe.repaints else kept, small, beside)


def repainted(x: Tensor, start: Start, path: Path, i: int) -> Tensor:
    """x after step i, with the picture itself, in the noise of the next step, where nothing is to be painted."""
    if start.kept is None or start.mask is None:
        return x
    last = i == len(path) - 1
    around = start.kept if last else add_noise(start.kept, start.noise, path.level[i + 1])
    return (1 - start.mask) * around + start.mask * x
