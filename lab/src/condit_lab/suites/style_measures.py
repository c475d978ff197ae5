"""What says whether a style transfer worked: pure functions, and the comparison with a baseline's curve.

Features are rows (N, D) of N pictures, results fp32 or bool (N,). Which feature measures what:
docs/papers/style-evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from condit_lab.suites.measures import RESAMPLES, resample

NEIGHBOURS = 3
_EQUAL = 1e-9  # two means of the same numbers, summed in another order


@dataclass(frozen=True)
class Scale:
    """Features brought to zero mean and unit deviation over real icons, then to unit length: a product is a cosine."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Scale:
        return cls(real.mean(0), real.std(0).clamp(min=1e-6))

    def __call__(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.mean) / self.deviation, dim=-1)


def retrieved(pictures: Tensor, references: Tensor, styles: Sequence[str]) -> Tensor:
    """Whether a picture is nearer to its own reference than to every reference of another style: unit features (N, D)
    twice, the style of each reference -> bool (N,). References of its own style are left out: they are as right."""
    other = torch.tensor([[a != b for b in styles] for a in styles])
    scores = pictures @ references.T
    nearest = scores.masked_fill(~other, -torch.inf).amax(1)
    return scores.diagonal() > nearest


def retrieval_chance(styles: Sequence[str]) -> float:
    """The share that `retrieved` finds by chance: 1 / (references of other styles + its own), averaged."""
    return float(np.mean([1 / (1 + sum(other != own for other in styles)) for own in styles]))


def cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """Of each picture with its own text, (N, D) twice -> (N,)."""
    return F.cosine_similarity(pictures.float(), texts.float(), dim=-1)


def above_others(pictures: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """The cosine with a picture's own text less its mean cosine with the others' texts, those of another number; with
    none of them, less nothing. (N, D) twice, (N,) -> (N,)."""
    scores = F.normalize(pictures.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    other = (numbers[:, None] != numbers[None]).float()
    return scores.diagonal() - (scores * other).sum(1) / other.sum(1).clamp(min=1)


def reach(bank: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """How far each real picture reaches: the distance to its k-th neighbour in the bank, (M, D) -> (M,)."""
    if len(bank) <= neighbours:
        raise ValueError(f"A manifold needs more than {neighbours} real icons; found {len(bank)}.")
    # The nearest of all is the picture itself.
    return torch.cat([torch.cdist(p, bank).topk(neighbours + 1, largest=False)[0][:, -1] for p in bank.split(256)])


def realistic(pictures: Tensor, bank: Tensor, reaches: Tensor) -> Tensor:
    """Whether a picture lies in the manifold of real ones: within reach of some real picture. Its mean is the improved
    precision of Kynkäänniemi et al. 2019 (arXiv:1904.06991). (N, D), (M, D), (M,) -> bool (N,)."""
    return torch.cat([(torch.cdist(part, bank) <= reaches).any(1) for part in pictures.split(256)])


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive pair scores above a negative one (Mann-Whitney); 0.5 = the score is blind."""
    both = torch.cat([positive, negative]).double()
    _, numbers, counts = both.unique(sorted=True, return_inverse=True, return_counts=True)
    above = counts.cumsum(0).double()
    rank = above - (counts - 1).double() / 2  # equal scores share their mean rank
    wins = rank[numbers[: len(positive)]].sum() - len(positive) * (len(positive) + 1) / 2
    return float(wins / (len(positive) * len(negative)))


def crossing(styles: NDArray, values: NDArray, at: NDArray) -> tuple[NDArray, NDArray]:
    """A curve's value where it first reaches a style: (R, K) points in the order of the strength, at (R,) -> values
    (R,) and where the style lies: -1 below the whole curve, 0 on it, 1 above it, (R,). Between two points it's linear.

    Of several crossings the one at the least strength counts: who needs no more would not ask for more. Beyond an end
    the value is that of the curve's least or greatest style."""
    low, high = styles.min(1), styles.max(1)
    side = np.where(at > high + _EQUAL, 1, np.where(at < low - _EQUAL, -1, 0))
    held = np.clip(at, low, high)[:, None]
    left, right = styles[:, :-1], styles[:, 1:]
    between = (np.minimum(left, right) - _EQUAL <= held) & (held <= np.maximum(left, right) + _EQUAL)
    first = between.argmax(1)[:, None]
    a, b, u, v = (np.take_along_axis(x, first, 1)[:, 0] for x in (left, right, values[:, :-1], values[:, 1:]))
    flat = np.abs(b - a) <= _EQUAL
    share = np.where(flat, 0.0, (held[:, 0] - a) / np.where(flat, 1.0, b - a))
    return u + np.clip(share, 0, 1) * (v - u), side


@dataclass(frozen=True)
class Gap:
    """A point against a curve at the same style: value less the curve's, with its 95 % interval. None where the curve
    doesn't reach the style (`side` says which way). outside: share of the resamples in which it doesn't."""

    style: float
    value: float
    side: Literal["on", "above", "below"]
    curve: float | None
    difference: float | None
    low: float | None
    high: float | None
    outside: float

    def verdict(self, more_is_better: bool) -> Literal["better", "worse", "even", "out of range"]:
        """`even` where the interval covers 0."""
        if self.low is None or self.high is None:
            return "out of range"
        if self.low <= _EQUAL and self.high >= -_EQUAL:
            return "even"
        return "better" if (self.low > 0) == more_is_better else "worse"


def against_curve(
    curve_styles: Sequence[Tensor | NDArray],
    curve_values: Sequence[Tensor | NDArray],
    style: Tensor | NDArray,
    value: Tensor | NDArray,
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Gap:
    """A method at one strength against a baseline over its strengths (in rising order), picture by picture.

    Everything is of the same n pictures, so both are drawn together (paired bootstrap over clusters): the curve is made
    anew in every resample and asked for the style that the method has there. A resample beyond the curve's ends takes
    the nearer end. ValueError for a curve of fewer than two points."""
    if len(curve_styles) != len(curve_values) or len(curve_styles) < 2:
        raise ValueError(
            f"A curve needs the style and value of at least two strengths; found {len(curve_styles)} styles and "
            f"{len(curve_values)} values."
        )
    rows = [*curve_styles, *curve_values, style, value]
    k = len(curve_styles)
    means = np.array([[float(np.asarray(row, dtype=np.float64).mean())] for row in rows])
    at_style, side = crossing(means[:k].T, means[k : 2 * k].T, means[-2])
    if side[0]:
        where: Literal["above", "below"] = "above" if side[0] > 0 else "below"
        return Gap(float(means[-2, 0]), float(means[-1, 0]), where, None, None, None, None, 1.0)
    drawn = resample(rows, clusters, resamples=resamples, seed=seed)
    curve, sides = crossing(drawn[:k].T, drawn[k : 2 * k].T, drawn[-2])
    low, high = np.percentile(drawn[-1] - curve, [2.5, 97.5])
    point = float(means[-1, 0] - at_style[0])
    outside = float((sides != 0).mean())
    return Gap(
        float(means[-2, 0]), float(means[-1, 0]), "on", float(at_style[0]), point, float(low), float(high), outside
    )
