"""Several references of one image in one IP-Adapter: how their features become one, or stay several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from condit.data.images import ImageSource

Combine = Literal["mean", "concat", "add", "subtract", "sum"]
# What a projector reads: (B, E), or (B, L, H), or of a face both.
Features = Tensor | tuple[Tensor, Tensor]


def grouped(reference: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]) -> list[list]:
    """One reference, n of them, or n lists of R: n lists of R. ValueError for lists of different lengths."""
    outer = list(reference) if isinstance(reference, list | tuple) else [reference]
    groups = [list(r) if isinstance(r, list | tuple) else [r] for r in outer]
    if len({len(g) for g in groups}) != 1 or not groups[0]:
        raise ValueError(f"Every image needs equally many references; found {[len(g) for g in groups]}.")
    return groups


def combined(features: Features, how: Combine, weights: Sequence[float] | None = None) -> list[tuple[Features, float]]:
    """Features (n, R, ...) -> those of each attention, and its weight. "concat" keeps (n, R, ...)."""
    count = (features[0] if isinstance(features, tuple) else features).shape[1]
    if weights is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} references of an image.")
    if weights is not None and how == "mean" and abs(sum(weights)) < 1e-8:
        raise ValueError(f"combine='mean' divides by the sum of weights, which is 0: {list(weights)}.")
    if how == "concat":
        return [(features, 1.0)]
    if how == "sum":
        given = [1.0] * count if weights is None else list(weights)
        return [(each(features, lambda x, r=r: x[:, r]), w) for r, w in enumerate(given)]
    if how == "subtract" and count < 2:
        raise ValueError("combine='subtract' takes the others from the first reference: give two or more an image.")

    def one(x: Tensor) -> Tensor:
        if weights is not None:
            x = x * torch.tensor(weights).to(x).reshape(1, -1, *[1] * (x.ndim - 2))
        if how == "add":
            return x.sum(1)
        if how == "subtract":
            return x[:, 0] - x[:, 1:].mean(1)
        return x.mean(1) if weights is None else x.sum(1) / sum(weights)

    return [(each(features, one), 1.0)]


def each(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    if isinstance(features, tuple):
        return change(features[0]), change(features[1])
    return change(features)


def zeros_of(features: Features) -> Features:
    """No reference: one row of zeros."""
    return each(features, lambda x: torch.zeros_like(x[:1]))


def each_token(weights: Sequence[float], v: Tensor) -> Tensor:
    """Weights of R references over the tokens of V' (B, H, R T, D), which stand reference by reference."""
    return torch.tensor(weights).to(v).repeat_interleave(v.shape[2] // len(weights))[:, None]


def times(
    strength: float | Sequence[float] | Mapping[str, float], weight: float
) -> float | Mapping[str, float] | Tensor:
    """The strength of one reference of several: a number, numbers by prefix, or (n,). ValueError for what is none."""
    if isinstance(strength, Mapping):
        return {path: float(numbers(value)) * weight for path, value in strength.items()}
    found = numbers(strength)
    return float(strength) * weight if found.ndim == 0 else found * weight  # type: ignore[arg-type]


def numbers(strength: object) -> Tensor:
    """A strength as a tensor of no dimension, or one an image."""
    try:
        found = torch.as_tensor(strength, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim > 1 or not found.numel() or not found.isfinite().all():
        raise ValueError(
            "strength must be a finite number, one an image, or numbers by prefix of the layers' paths; found "
            f"{strength!r}."
        )
    return found
