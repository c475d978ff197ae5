"""The parts of a verification: a comparison with recorded tensors, its tolerance, and the measured differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.nn.layers import timestep_features

Differences = dict[str, float]  # name of what was compared -> largest difference; inf where it cannot be compared


@dataclass(frozen=True)
class Check:
    """One row of a report. compare(folder, case): compares everything that a fixture of `folder` records.

    files: patterns of the fixtures' names, separated by spaces, so that other sets of the same kinds can be compared.
    ways: with more than one way to compare a fixture, each is a case "NAME, WAY".
    """

    what: str
    against: str
    tolerance: float
    files: str
    compare: Callable[[Path, str], Differences]
    ways: tuple[str, ...] = ()

    def cases(self, folder: Path) -> list[str]:
        """Names, without ending, of the fixtures in a system's folder that this check compares."""
        names = sorted(file.stem for pattern in self.files.split() for file in folder.glob(pattern))
        return [f"{name}, {way}" for name in names for way in self.ways] if self.ways else names

    def run(self, folder: Path) -> CheckResult:
        """Compares every case with the fixtures in the system's `folder`."""
        cases = {case: self.compare(folder, case) for case in self.cases(folder)}
        return CheckResult(self.what, self.against, self.tolerance, cases)


@dataclass(frozen=True)
class CheckResult:
    """A check with the differences of each of its cases."""

    what: str
    against: str
    tolerance: float
    cases: Mapping[str, Differences]

    @property
    def worst(self) -> str:
        """The name of the largest difference."""
        return max(self._all(), key=lambda pair: pair[1], default=("nothing was compared", 0.0))[0]

    @property
    def measured(self) -> float:
        """The largest difference; inf if a part is NaN, or nothing was compared."""
        return max((value for _, value in self._all()), default=math.inf)

    @property
    def values(self) -> int:
        """The number of differences."""
        return sum(len(differences) for differences in self.cases.values())

    @property
    def ok(self) -> bool:
        return self.measured <= self.tolerance

    def exceeding(self) -> list[str]:
        """Everything that exceeds the tolerance, with its difference."""
        return [f"{name}: {value:.1e}" for name, value in self._all() if not value <= self.tolerance]

    def _all(self) -> Iterable[tuple[str, float]]:
        for case, differences in self.cases.items():
            if not differences:
                yield f"{case}: nothing was compared", math.inf
            for name, value in differences.items():
                yield f"{case}: {name}", math.inf if math.isnan(value) else value


def difference(actual: Tensor, expected: Tensor, *, relative: bool = False, whole: Tensor | None = None) -> float:
    """The largest absolute difference, or its ratio to the largest expected value; inf for different shapes. whole: the
    tensor that `expected` was cut from, whose values count too."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = max(x.abs().max().item() for x in (expected, whole) if x is not None) if relative else 1.0
    return (actual - expected).abs().max().item() / (largest or 1.0)


def compare(
    computed: Mapping[str, Tensor], recorded: Mapping[str, Tensor], prefix: str = "", *, relative: bool = False
) -> Differences:
    """Differences of all recorded tensors whose names begin with `prefix`; inf where one side lacks the name."""
    names = computed.keys() | {name for name in recorded if name.startswith(prefix)}
    return {
        name: difference(computed[name], recorded[name], relative=relative)
        if name in computed and name in recorded
        else math.inf
        for name in sorted(names)
    }


def recorded_features(dit: Path) -> Callable[[Tensor, int], Tensor]:
    """`timestep_features` with the 128 frequencies of the machine that recorded the fixtures, read from the features in
    the folder `dit`; without the folder, this machine's.

    The exponential of float32 differs in the last bit between processors (MKL rounds on Intel as on no other), and t =
    999 turns that bit into a difference of 3e-5, three times the tolerance of what follows.
    """
    file = dit / "model_a.safetensors"
    if not file.is_file():
        return timestep_features
    recorded = load_file(file)
    t, features = recorded["input.t"], recorded["act.t_sinusoid"].double()
    own = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    above, below = own.nextafter(torch.ones(())), own.nextafter(torch.zeros(()))
    nearest = torch.stack([own, above, below, above.nextafter(torch.ones(())), below.nextafter(torch.zeros(()))])
    angles = (t[:, None, None].float() * nearest).double()  # (B, candidates, 128)
    cosines, sines = (part[:, None] for part in features.chunk(2, -1))
    errors = ((angles.cos() - cosines).abs() + (angles.sin() - sines).abs()).amax(0)
    omega = nearest.gather(0, errors.argmin(0)[None])[0]

    def of(t: Tensor, dim: int = 256) -> Tensor:
        if dim != 256:
            return timestep_features(t, dim)
        angle = t[:, None].float() * omega
        return torch.cat([angle.cos(), angle.sin()], -1)

    return of


def layout_differences(tensors: Mapping[str, Tensor], recorded: Mapping[str, Sequence[int]]) -> Differences:
    """The number of names on one side only, and of shapes that differ."""
    shapes = sum(list(x.shape) != list(recorded[name]) for name, x in tensors.items() if name in recorded)
    return {"names": float(len(tensors.keys() ^ recorded.keys())), "shapes": float(shapes)}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
