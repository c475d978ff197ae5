"""Noise levels of samplers and of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def flow_sigmas(steps: int, *, shift: float = 1.0) -> Tensor:
    """Falling noise levels (steps + 1,) from 1 to 0 for rectified flow; sigma' = s sigma / (1 + (s - 1) sigma).

    Esser et al. 2024 (arXiv:2403.03206), Eq. 23. FLUX.1-dev's dynamic shift is `shift=exp(flux_mu(tokens))`.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; found {steps}.")
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def flux_mu(tokens: int, *, base: tuple[int, float] = (256, 0.5), maximum: tuple[int, float] = (4096, 1.15)) -> float:
    """log of FLUX.1-dev's shift: linear in the number of noisy image tokens through two points, also outside them."""
    (n0, m0), (n1, m1) = base, maximum
    return m0 + (m1 - m0) / (n1 - n0) * (tokens - n0)


@dataclass(frozen=True)
class DynamicShift:
    """A shift that grows with the number of noisy image tokens, as a scheduler's configuration says; the defaults are
    FLUX.1-dev's. kind: exp(mu), or mu itself."""

    base: tuple[int, float] = (256, 0.5)
    maximum: tuple[int, float] = (4096, 1.15)
    kind: Literal["exponential", "linear"] = "exponential"

    def __call__(self, tokens: int) -> float:
        mu = flux_mu(tokens, base=self.base, maximum=self.maximum)
        return math.exp(mu) if self.kind == "exponential" else mu


def logit_normal(n: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator) -> Tensor:
    """Training times t = sigmoid(N(mean, std)), (n,) float32. FLUX-like: mean 0; larger mean: more noise."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))
