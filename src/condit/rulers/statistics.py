"""Intervals by bootstrap, areas under the ROC, and the comparison with a baseline's curve. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 2000
_EQUAL = 1e-9  # two means of the same numbers, summed in another order


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over n pictures."""

    value: float
    low: float
    high: float
    n: int


def _draws(clusters: Sequence | None, n: int, resamples: int, seed: int) -> tuple[NDArray, NDArray]:
    """How often each resample draws each cluster (R, K), and the cluster number of every picture (n,)."""
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"There are {len(clusters)} clusters for {n} values. Give one for each value.")
    numbers = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    k = int(numbers.max()) + 1
    weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=resamples)
    return weights.astype(np.float64), numbers


def _resampled(values: NDArray, weights: NDArray, numbers: NDArray) -> NDArray:
    """The mean in every resample, (R,)."""
    k = weights.shape[1]
    sums, counts = np.bincount(numbers, values, k), np.bincount(numbers, minlength=k)
    return (weights @ sums) / (weights @ counts)


def _values(values: Sequence | Tensor | NDArray) -> NDArray:
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise ValueError(f"A mean needs a row of finite numbers; found shape {row.shape}, {row[:4]}.")
    return row


def bootstrap(
    values: Sequence | Tensor | NDArray,
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean and percentile interval (Efron 1979). Whole clusters are drawn: pictures of one concept hang together."""
    sample = _values(values)
    means = _resampled(sample, *_draws(clusters, len(sample), resamples, seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high), len(sample))


def resample(
    rows: Sequence[Sequence | Tensor | NDArray],
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray:
    """Means of several values of the same n pictures, M rows of (n,), in every resample, drawn together: (M, R)."""
    samples = [_values(row) for row in rows]
    if len({len(row) for row in samples}) != 1:
        raise ValueError(
            f"All rows must be of the same images; found rows of {sorted({len(row) for row in samples})} values."
        )
    draws = _draws(clusters, len(samples[0]), resamples, seed)
    return np.stack([_resampled(row, *draws) for row in samples])


def ratio(
    values: Sequence | Tensor | NDArray,
    ceiling: Sequence | Tensor | NDArray,
    clusters: Sequence | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """mean(values) / mean(ceiling) over the same pictures, drawn together. None where the ceiling can be 0."""
    above, below = _values(values), _values(ceiling)
    if len(above) != len(below):
        raise ValueError(f"Values and ceiling must be of the same images; found {len(above)} and {len(below)} values.")
    draws = _draws(clusters, len(above), resamples, seed)
    bases = _resampled(below, *draws)
    if below.mean() == 0 or (bases == 0).any():
        return None
    low, high = np.percentile(_resampled(above, *draws) / bases, [2.5, 97.5])
    return Interval(float(above.mean() / below.mean()), float(low), float(high), len(above))


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
    p: float | None = None  # two-sided, of no difference, from the resamples

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
    differences = drawn[-1] - curve
    low, high = np.percentile(differences, [2.5, 97.5])
    point = float(means[-1, 0] - at_style[0])
    outside = float((sides != 0).mean())
    return Gap(
        float(means[-2, 0]),
        float(means[-1, 0]),
        "on",
        float(at_style[0]),
        point,
        float(low),
        float(high),
        outside,
        p_value(differences),
    )


def p_value(resampled: NDArray) -> float:
    """Two-sided, that a difference is 0, from its bootstrap resamples (R,): at least 2 / (R + 1)."""
    below = min((resampled <= _EQUAL).sum(), (resampled >= -_EQUAL).sum())
    return min(1.0, 2 * float(below + 1) / (len(resampled) + 1))


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): below 0.05 for any false difference in 5 % of reports."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, values[i] * (len(values) - rank)))
        corrected[i] = largest
    return corrected


def needed(n: int, low: float, high: float, difference: float = 0.05) -> int:
    """How many pictures tell a difference in 80 % of studies at 5 %, where n gave a 95 % interval: its width falls with
    the root of their number."""
    error = (high - low) / (2 * 1.959964)
    return max(2, int(np.ceil(n * ((1.959964 + 0.841621) * error / difference) ** 2)))


def spearman(a: NDArray, b: NDArray) -> float:
    """Correlation of ranks, of which equal values share the mean; NaN where either does not vary."""
    from scipy.stats import rankdata

    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def auc_interval(
    scores: NDArray, same: NDArray, first: NDArray, second: NDArray, *, resamples: int = 400, seed: int = 0
) -> Interval:
    """Area under the ROC of pairs, (P,): the chance that a `same` pair scores above another. first, second: the groups
    of a pair's pictures, numbers from 0. The interval is a bootstrap over groups, which all pairs of a group follow.
    ValueError without both kinds of pairs."""
    if not same.any() or same.all():
        raise ValueError("an area under the ROC needs pairs of both kinds")
    _, numbers = np.unique(scores, return_inverse=True)
    steps = int(numbers.max()) + 1

    def area(weights: NDArray) -> float:
        positive = np.bincount(numbers, weights * same, steps)
        negative = np.bincount(numbers, weights * ~same, steps)
        total = positive.sum() * negative.sum()
        return float(positive @ (negative.cumsum() - negative / 2) / total) if total else 0.5

    groups = int(max(first.max(), second.max())) + 1
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    areas = [area(np.where(first == second, w[first], w[first] * w[second]).astype(np.float64)) for w in drawn]
    low, high = np.percentile(areas, [2.5, 97.5])
    return Interval(area(np.ones(len(scores))), float(low), float(high), groups)
