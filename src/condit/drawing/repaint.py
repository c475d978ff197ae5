"""Image to image and inpainting: the start of a run, and what it keeps of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condit.controls.control import match_batch
from condit.data.images import ImageSource, mask_images
from condit.diffusion.steps import Path, draw
from condit.drawing.model import Layout, Model
from condit.drawing.settings import Settings

Images = ImageSource | Sequence[ImageSource]


class Reader(Protocol):
    """The pipeline of a run."""

    @property
    def model(self) -> Model: ...

    @property
    def device(self) -> torch.device: ...

    def read_images(self, reference: Images, annotator: str | None, size: tuple[int, int] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Start:
    """What a run starts from: latents x at the first level; with an image to repaint, its latents `kept` where `mask`
    is 0, and the `noise` that is added to them; `extra`: channels that an inpainting model reads with the latents."""

    x: Tensor
    noise: Tensor
    kept: Tensor | None = None
    mask: Tensor | None = None
    extra: Tensor | None = None


def check_picture(name: str, model: Model, image: Images | None, mask: Images | None, strength: float | None) -> None:
    """Raises ValueError where image, mask and strength do not fit together or to the model."""
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1]; found {strength}.")
    if image is not None and "strength" not in model.supports:
        raise ValueError(f"{name} does not support image to image. Leave image= out.")
    if mask is not None and image is None:
        raise ValueError("mask_image says where to repaint: give image= too.")
    if image is None and strength not in (None, 1):
        raise ValueError(f"strength {strength} says how much of an image to change: give image= too.")
    if model.repaints and mask is None:
        raise ValueError(f"{name} is an inpainting model: give image= and mask_image=, white where to paint.")


def share_changed(settings: Settings, mask: Images | None) -> float:
    """The strength of image to image, with its defaults."""
    if settings.strength is not None:
        return settings.strength
    return 0.8 if mask is None else 1.0


def skipped(steps: int, strength: float) -> int:
    """The number of steps that image to image leaves out."""
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise ValueError(f"strength {strength} of {steps} steps leaves none. Raise one of them.")
    return steps - kept


def start_of(
    pipe: Reader,
    image: Images | None,
    mask_image: Images | None,
    strength: float,
    layout: Layout,
    path: Path,
    generators: Sequence[torch.Generator],
    latents: Tensor | None,
) -> Start:
    """The first latents. Each generator is used for, in order: the image's posterior, the noise, the posterior of the
    image around the mask."""
    model, batch, size, shape = pipe.model, layout.batch, layout.size, pipe.model.cells_shape(layout.size)
    pixels = mask = kept = small = extra = None
    if image is not None:
        pixels = match_batch(pipe.read_images(image, None, size), batch, "image")
    if mask_image is not None:
        white = (pipe.read_images(mask_images(mask_image), None, size)[:, :1] + 1) / 2
        mask = match_batch((white >= 0.5).float(), batch, "mask_image")
        small = torch.nn.functional.interpolate(mask, size=shape[1:])
    if pixels is not None and not (model.repaints and strength == 1):
        kept = model.encode(pixels, generators)
    if latents is None:
        noise = model.arrange(draw(shape, generators), layout).to(pipe.device)
    else:
        noise = model.check_latents(latents, layout).float().to(pipe.device)
    if model.repaints and pixels is not None and mask is not None and small is not None:
        extra = torch.cat([small, model.encode(pixels * (1 - mask), generators)], 1)
    # An image to repaint at full strength is generated from noise alone, as diffusers does.
    if kept is None or (mask is not None and strength == 1):
        x = model.first(noise, path)
    else:
        x = pipe.model.noised(kept, noise, path, 0)
    arranged = None if small is None else model.arrange(small.expand(-1, shape[0], -1, -1), layout)
    return Start(x, noise, None if model.repaints else kept, arranged, extra)


def repainted(pipe: Reader, x: Tensor, start: Start, path: Path, i: int) -> Tensor:
    """x after step i, with the image at the noise level of the next step where the mask is 0."""
    if start.kept is None or start.mask is None:
        return x
    around = start.kept if i == len(path) - 1 else pipe.model.noised(start.kept, start.noise, path, i + 1)
    return (1 - start.mask) * around + start.mask * x
