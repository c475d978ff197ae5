"""What a verification is made of: a comparison with something recorded, its tolerance, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

Differences = dict[str, float]  # name of what was compared -> largest difference; inf where it cannot be compared


@dataclass(frozen=True)
class Check:
    """One row of a report. compare(folder, case): everything that a fixture of `folder` records, against ours.

    files: a pattern of the fixtures' names, so that another set of the same kinds is compared as it is. ways: a fixture
    that is compared in several is a case in each, "NAME, WAY".
    """

    what: str
    against: str
    tolerance: float
    files: str
    compare: Callable[[Path, str], Differences]
    ways: tuple[str, ...] = ()

    def cases(self, folder: Path) -> list[str]:
        """Names, without ending, of the fixtures in a backbone's folder that this check compares."""
        names = sorted(file.stem for file in folder.glob(self.files))
        return [f"{name}, {way}" for name in names for way in self.ways] if self.ways else names

    def run(self, folder: Path) -> Row:
        """Compares every case with the fixtures in the backbone's `folder`."""
        cases = {case: self.compare(folder, case) for case in self.cases(folder)}
        return Row(self.what, self.against, self.tolerance, cases)


@dataclass(frozen=True)
class Row:
    """A check with what it measured in each of its cases."""

    what: str
    against: str
    tolerance: float
    cases: Mapping[str, Differences]

    @property
    def worst(self) -> str:
        """Where the largest difference is."""
        return max(self._all(), key=lambda pair: pair[1], default=("nothing was compared", 0.0))[0]

    @property
    def measured(self) -> float:
        """The largest difference; inf if a part is NaN, or nothing was compared."""
        return max((value for _, value in self._all()), default=math.inf)

    @property
    def ok(self) -> bool:
        return self.measured <= self.tolerance

    def exceeding(self) -> list[str]:
        """Everything beyond the tolerance, with its difference."""
        return [f"{name}: {value:.1e}" for name, value in self._all() if not value <= self.tolerance]

    def _all(self) -> Iterable[tuple[str, float]]:
        for case, differences in self.cases.items():
            if not differences:
                yield f"{case}: nothing was compared", math.inf
            for name, value in differences.items():
                yield f"{case}: {name}", math.inf if math.isnan(value) else value


def difference(found: Tensor, expected: Tensor, *, relative: bool = False, whole: Tensor | None = None) -> float:
    """The largest one, or its part of the largest expected value; inf for another shape. whole: what `expected` was
    clipped from, whose values count too."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().double(), expected.detach().double()
    largest = max(x.abs().max().item() for x in (expected, whole) if x is not None) if relative else 1.0
    return (found - expected).abs().max().item() / (largest or 1.0)


def layout_differences(found: Mapping[str, Tensor], told: Mapping[str, Sequence[int]]) -> Differences:
    """How many names stand on one side only, and how many shapes differ."""
    shapes = sum(list(x.shape) != list(told[name]) for name, x in found.items() if name in told)
    return {"names": float(len(found.keys() ^ told.keys())), "shapes": float(shapes)}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
