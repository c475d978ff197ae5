"""What all samplers share: steps, noise and one signature.

    sampler(predict, x, path, *, eta=0.0, noise=None, on_step=None) -> x at the path's end

A sampler is a function without state. `path` holds the noise levels; `predict(x, step)` is the (guided) network; its
output is what the family of the path predicts: velocity, noise, v, or the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of a sampler: its number, how many there are, and the noise level at which it begins.

    t: the level in [0, 1], where 1 is noise alone; controls read it. time: the same level in the network's own unit: a
    timestep of 1000, or sigma.
    """

    index: int
    count: int
    t: float
    time: float = math.nan


# predict(x, step): the output of the network for x (B, ...), of x's shape or with the variance's channels behind.
Predict = Callable[[Tensor, Step], Tensor]
# noise(x): standard normal numbers of x's shape and device. Samplers call it once a step.
Noise = Callable[[Tensor], Tensor]
# on_step(number of the step, x after it, its estimate of the clean x0): may return another x.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


class Path(Protocol):
    """The noise levels of a run, the noisiest first."""

    # The number of steps.
    def __len__(self) -> int: ...

    def step(self, index: int) -> Step: ...


class PartPath(Path, Protocol):
    """A path that image-to-image generation may enter after its first steps."""

    # The steps from number `begin` on.
    def since(self, begin: int) -> Self: ...


def finish_step(on_step: OnStep | None, index: int, x: Tensor, x0: Tensor) -> Tensor:
    """x after a step, or what `on_step` returns instead."""
    replaced = None if on_step is None else on_step(index, x, x0)
    return x if replaced is None else replaced


def by_timestep(denoise: Callable[[Tensor, Tensor], Tensor]) -> Predict:
    """predict(x, step) from a network that takes (x, t) with t (B,), the step's `time`."""
    return lambda x, step: denoise(x, torch.full((len(x),), step.time, dtype=x.dtype, device=x.device))


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (N, *shape) float32 on the CPU; row n comes from generator n alone."""
    return torch.stack([torch.randn(tuple(shape), generator=g, device=g.device).cpu() for g in generators])


def image_noise(generators: Sequence[torch.Generator]) -> Noise:
    """Noise for a sampler, each image from its own generator, so that an image does not depend on its batch."""

    def noise(x: Tensor) -> Tensor:
        if len(generators) != len(x):
            raise ValueError(f"One generator per image is needed; found {len(generators)} for {len(x)} images.")
        return draw(x.shape[1:], generators).to(x.device)

    return noise
