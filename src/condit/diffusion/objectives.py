"""Training objectives: rectified flow (Liu et al. 2022, arXiv:2209.03003), with velocity or clean-image prediction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "x"]

# v = (x_t - x0) / t grows without bound as t -> 0; below this level the division is by the level instead.
SMALLEST_T = 0.05


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise; x0 (B, N, C), t (B,)."""
    t = t[:, None, None]
    return (1 - t) * x0 + t * noise


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Network output -> velocity (noise - x0). For "x": (x_t - x0) / max(t, 0.05) (Li & He 2025, arXiv:2511.13720)."""
    if prediction == "velocity":
        return output
    return (x_t - output) / t.clamp(min=SMALLEST_T)[:, None, None]


def flow_loss(output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction = "velocity") -> Tensor:
    """Squared error of the velocity, (B,) in float32, mean over tokens and channels."""
    if prediction == "velocity":
        error = output.float() - (noise - x0)
    else:
        error = (output.float() - x0) / t.clamp(min=SMALLEST_T)[:, None, None]
    return error.square().flatten(1).mean(1)


def drop(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """Which of n samples lose a condition, (n,) bool."""
    return torch.rand(n, generator=generator) < probability
