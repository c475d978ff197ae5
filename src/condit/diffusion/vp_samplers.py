"""Samplers on `diffusion/vp.py`: DDIM (Song et al. 2020, arXiv:2010.02502) and DPM-Solver++ of second order (Lu et al.
2022, arXiv:2211.01095, Alg. 2).

Euler and ancestral Euler (Karras et al. 2022, arXiv:2206.00364) are DDIM at their own levels: for x0 + sigma eps with
eps held fixed over a step both go along the same line, and the ancestral noise is that of eta = 1. Steps are functions
of their own and go in either direction, to the image or to noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from condit.diffusion.steps import Noise, OnStep, Predict, finish_step
from condit.diffusion.vp import Prediction, VPPath


@dataclass(frozen=True)
class Estimate:
    """The network's estimates at x: the image x0 and the noise eps, both (B, ...)."""

    x0: Tensor
    eps: Tensor


def estimate(output: Tensor, x: Tensor, level: float, prediction: Prediction) -> Estimate:
    """From a network that predicts the noise, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022,
    arXiv:2202.00512), or the image."""
    a, s = level**0.5, (1 - level) ** 0.5
    if prediction == "epsilon":
        return Estimate((x - s * output) / a, output)
    if prediction == "v_prediction":
        return Estimate(a * x - s * output, a * output + s * x)
    return Estimate(output, (x - a * output) / s)


def ddim_step(
    estimated: Estimate, level: float, after: float, *, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """x at level `after` (Eq. 12). eta 0: no noise is added; eta 1: as much as DDPM adds."""
    deviation = eta * ((1 - after) / (1 - level) * (1 - level / after)) ** 0.5 if eta else 0.0
    x = after**0.5 * estimated.x0 + max(1 - after - deviation**2, 0.0) ** 0.5 * estimated.eps
    if not eta:
        return x
    if noise is None:
        raise ValueError(f"DDIM with eta {eta} adds noise: give noise, for instance image_noise(generators).")
    return x + deviation * noise


def log_snr(level: float) -> float:
    """lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)); infinite for the image itself."""
    return math.inf if level >= 1 else 0.5 * math.log(level / (1 - level))


def dpm_step(
    x: Tensor, x0: Tensor, level: float, after: float, *, before: tuple[Tensor, float] | None = None
) -> Tensor:
    """x at level `after` by DPM-Solver++ (2M, midpoint). `before`: x0 and level of the step before it; None: first
    order, which is DDIM."""
    h = log_snr(after) - log_snr(level)
    direction = x0
    if before is not None:
        r = (log_snr(level) - log_snr(before[1])) / h
        direction = x0 + (x0 - before[0]) / (2 * r)
    return ((1 - after) / (1 - level)) ** 0.5 * x - after**0.5 * math.expm1(-h) * direction


def ddim(
    predict: Predict,
    x: Tensor,
    path: VPPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x (B, ...) at the path's first level -> at its end. `noise` is called once a step where eta > 0."""
    for step, level, after in path.rows():
        estimated = estimate(predict(x, step), x, level, path.process.prediction_type)
        drawn = noise(x) if eta and noise is not None else None
        moved = ddim_step(estimated, level, after, eta=eta, noise=drawn)
        x = finish_step(on_step, step.index, moved, estimated.x0)
    return x


def dpm_solver(
    predict: Predict,
    x: Tensor,
    path: VPPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x (B, ...) at the path's first level -> at its end. The first step is of first order, and the last one where it
    ends in the image itself, with `euler_at_final`, or by `lower_order_final` among fewer than 15. Raises ValueError
    for eta, which this sampler does not have."""
    if eta:
        raise ValueError(f"DPM-Solver++ is deterministic and has no eta; found {eta}.")
    process, before = path.process, None
    short = process.euler_at_final or (process.lower_order_final and len(path) < 15)
    for step, level, after in path.rows():
        x0 = estimate(predict(x, step), x, level, process.prediction_type).x0
        last = step.index == len(path) - 1 and (after >= 1 or short)
        moved = dpm_step(x, x0, level, after, before=None if last else before)
        before = x0, level
        x = finish_step(on_step, step.index, moved, x0)
    return x


def sample(
    predict: Predict,
    x: Tensor,
    path: VPPath,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """By the path's own solver. eta is DDIM's; Euler has 0, its ancestral form 1."""
    if path.solver == "dpm++":
        return dpm_solver(predict, x, path, noise=noise, on_step=on_step)
    share = {"ddim": eta, "euler": 0.0, "euler-ancestral": 1.0}[path.solver]
    return ddim(predict, x, path, eta=share, noise=noise, on_step=on_step)
