"""Which drawings are trained on: the rules of the first world (docs/tiny-data.md), five more looks that are never
trained, and no training drawing that nearly equals a held-out one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from condit.data.files import hash_fraction
from condit_lab.icons.world import HELD_OUT_SHARE

# A line, a duotone, a painted, a pixel and a 3D look; the first world holds out streamline-emojis.
HELD_OUT_LOOKS = {
    "cyber": "line",
    "cyber-color": "line",
    "uim": "duotone",
    "clipart-gerald": "painted",
    "streamline-pixel": "pixel",
    "inflated": "3d",
}
NEAR = 0.965  # product of two descriptors above which two drawings count as the same
NEAR_SPLIT = "near"  # neither trained on nor tested on
_BLOCK = 2048


def split_of(concept: str, style: str, own: str, families: Collection[str]) -> str:
    """The split of a drawing of the new sets: own = its family, families = every trained family that draws the
    concept. The first world's drawings keep theirs."""
    held_concept = hash_fraction(f"concept/{concept}") < HELD_OUT_SHARE
    if style in HELD_OUT_LOOKS:
        return "style+concept" if held_concept else "style"
    if held_concept:
        return "concept"
    others = set(families) - {own}
    return "combo" if hash_fraction(f"combo/{concept}/{own}") < HELD_OUT_SHARE and len(others) >= 3 else "train"


def near_pairs(left: NDArray[np.float32], right: NDArray[np.float32], threshold: float = NEAR) -> NDArray[np.bool_]:
    """For every row of left, whether some row of right nearly equals it. Rows are descriptors."""
    out = np.zeros(len(left), bool)
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        best = np.full(len(block), -1.0, np.float32)
        for other in range(0, len(right), 4 * _BLOCK):
            np.maximum(best, (block @ right[other : other + 4 * _BLOCK].T).max(1, initial=-1.0), out=best)
        out[start : start + _BLOCK] = best >= threshold
    return out


def without_near(
    splits: Sequence[str], fixed: Sequence[bool], apart: Sequence[bool], descriptors: NDArray[np.float32]
) -> list[str]:
    """Splits in which no training drawing nearly equals a held-out one. fixed drawings (the first world's) keep their
    split: a held-out newcomer near a fixed training drawing leaves the tests, a training newcomer near any held-out
    drawing leaves training. Drawings that stand apart are not compared."""
    split, kept, compared = np.array(splits), np.array(fixed), ~np.array(apart)
    train = split == "train"
    out = split.astype(object)
    newcomers = np.flatnonzero(~train & ~kept & compared)
    out[newcomers[near_pairs(descriptors[newcomers], descriptors[train & kept])]] = NEAR_SPLIT
    held = (out != "train") & (out != NEAR_SPLIT) & compared
    trained = np.flatnonzero(train & ~kept)
    out[trained[near_pairs(descriptors[trained], descriptors[held])]] = NEAR_SPLIT
    return [str(name) for name in out]
