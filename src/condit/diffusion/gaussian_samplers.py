"""Samplers of Gaussian diffusion: ancestral (DDPM, Ho et al. 2020, arXiv:2006.11239), DDIM and its inverse (Song et al.
2020, arXiv:2010.02502), on the processes of `diffusion/gaussian.py`.

Callers use torch.no_grad(), as networks are rarely trained through a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condit.diffusion.gaussian import Gaussian, at, reverse
from condit.diffusion.steps import Noise, OnStep, Predict, finish_step


@dataclass(frozen=True)
class Sample:
    """Images after one step, and the estimate of x0 that the step was built on."""

    x: Tensor
    x0: Tensor


def ancestral_step(
    process: Gaussian, output: Tensor, x: Tensor, i: Tensor, noise: Tensor, *, clip: bool = False
) -> Sample:
    """Sample x_{i-1} from p(x_{i-1} | x_i); at i = 0 return its mean."""
    p = reverse(process, output, x, i, clip=clip)
    return Sample(p.mean + _not_last(i, x) * (0.5 * p.log_variance).exp() * noise, p.x0)


def ddim_step(
    process: Gaussian,
    output: Tensor,
    x: Tensor,
    i: Tensor,
    noise: Tensor | None = None,
    *,
    eta: float = 0.0,
    clip: bool = False,
) -> Sample:
    """DDIM, Eq. 12. eta 0: no noise is added; eta 1: as much as DDPM."""
    x0, direction = _estimates(process, output, x, i, clip)
    alpha_bar, before = at(process.alphas_cumprod, i, x), at(process.alphas_cumprod_prev, i, x)
    sigma = eta * ((1 - before) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / before).sqrt()
    moved = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * direction
    if noise is not None:
        moved = moved + _not_last(i, x) * sigma * noise
    elif eta:
        raise ValueError(f"DDIM with eta {eta} adds noise: give noise, for instance image_noise(generators).")
    return Sample(moved, x0)


def ddim_reverse_step(process: Gaussian, output: Tensor, x: Tensor, i: Tensor, *, clip: bool = False) -> Sample:
    """One step towards noise, from level i to level i + 1 (after the last: to pure noise), by the same equation."""
    x0, direction = _estimates(process, output, x, i, clip)
    after = at(process.alphas_cumprod_next, i, x)
    return Sample(after.sqrt() * x0 + (1 - after).sqrt() * direction, x0)


def _estimates(process: Gaussian, output: Tensor, x: Tensor, i: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """x0, and the noise that leads from it to x: after clipping it is not the predicted one."""
    x0 = reverse(process, output, x, i, clip=clip).x0
    scaled = at(process.sqrt_recip_alphas_cumprod, i, x) * x
    return x0, (scaled - x0) / at(process.sqrt_recipm1_alphas_cumprod, i, x)


def _not_last(i: Tensor, x: Tensor) -> Tensor:
    if i.ndim == 0:
        return (i != 0).float()
    return (i != 0).float().to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def ancestral(
    predict: Predict,
    x: Tensor,
    path: Gaussian,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    clip: bool = False,
) -> Tensor:
    """Images from noise x (B, C, H, W). `noise` is called once a step, also at the last, as the official sampler does.
    Raises ValueError for eta, which this sampler does not support, and without `noise`."""
    if eta or noise is None:
        raise ValueError(f"The ancestral sampler needs noise= and has no eta; found eta {eta}, noise {noise}.")

    def step(output: Tensor, x: Tensor, i: Tensor) -> Sample:
        return ancestral_step(path, output, x, i, noise(x), clip=clip)

    return _walk(predict, x, path, reversed(range(len(path))), step, on_step)


def ddim(
    predict: Predict,
    x: Tensor,
    path: Gaussian,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    clip: bool = False,
) -> Tensor:
    """Images from noise x (B, C, H, W) by DDIM. `noise` is called where eta > 0 only."""

    def step(output: Tensor, x: Tensor, i: Tensor) -> Sample:
        return ddim_step(path, output, x, i, noise(x) if noise and eta else None, eta=eta, clip=clip)

    return _walk(predict, x, path, reversed(range(len(path))), step, on_step)


def ddim_invert(
    predict: Predict, x: Tensor, path: Gaussian, *, clip: bool = False, on_step: OnStep | None = None
) -> Tensor:
    """Noise from images x (B, C, H, W): N - 1 reverse steps, to the level at which `ddim` of this process begins."""

    def step(output: Tensor, x: Tensor, i: Tensor) -> Sample:
        return ddim_reverse_step(path, output, x, i, clip=clip)

    return _walk(predict, x, path, range(len(path) - 1), step, on_step)


def _walk(
    predict: Predict,
    x: Tensor,
    path: Gaussian,
    indices: Iterable[int],
    step: Callable[[Tensor, Tensor, Tensor], Sample],
    on_step: OnStep | None,
) -> Tensor:
    for number, index in enumerate(indices):
        now = replace(path.step(len(path) - 1 - index), index=number)
        sample = step(predict(x, now), x, torch.tensor(index))
        x = finish_step(on_step, number, sample.x, sample.x0)
    return x
