"""The cost of a prediction of FLUX's transformer in closed form (OminiControl, arXiv:2411.15098; OminiControl2,
arXiv:2503.08280).

Linear layers take 24 D^2 operations per layer and token, attention takes 4 D Lq Lk; so n tokens of text and image cost
n (6D + n) in units of 4 D. Norms, embeddings and low-rank updates (0.2 % at rank 4) are not counted.
"""

from __future__ import annotations

from typing import Literal

ConditionMode = Literal["none", "joint", "independent", "cached", "prefill"]
STEPS = 28  # of an image; the cache is written once in all of them


def ratio(mode: ConditionMode, dim: int, n: int, c: int, count: int = 1) -> float:
    """Operations of a prediction with `count` conditions of c tokens, divided by those of one without conditions.

    Conditions do not attend to each other. joint: a condition attends to text and image; independent: to itself;
    cached: only its keys are read, the lower bound; prefill: the pass of the conditions alone, in the same unit."""
    each = {
        "none": 0,
        "joint": c * (6 * dim + 2 * n + c),
        "independent": c * (6 * dim + n + c),
        "cached": c * n,
        "prefill": c * (6 * dim + c),
    }[mode]
    return (mode != "prefill") + count * each / (n * (6 * dim + n))


def average(dim: int, n: int, c: int, count: int = 1, steps: int = STEPS) -> float:
    """The mean of `ratio` over the steps of an image whose first step, or prefill, writes the cache."""
    return ratio("cached", dim, n, c, count) + ratio("prefill", dim, n, c, count) / steps


def operations(dim: int, layers: int, n: int) -> int:
    """Operations of one prediction without conditions."""
    return 4 * dim * layers * n * (6 * dim + n)


def cache_bytes(dim: int, layers: int, tokens: int, size: int) -> int:
    """Bytes of the keys and values of every layer; size: bytes of a number."""
    return 2 * dim * layers * tokens * size


def activation_bytes(dim: int, tokens: int, size: int) -> int:
    """Roughly the peak memory of a block in bytes, without gradients: a single block's input, norm, queries, keys and
    values, the MLP's four widths before and after its GELU, and both joined (19 widths), and a rotation in float32."""
    return tokens * dim * (19 * size + 4 * 4)
