"""Rows of `condit evaluate edit`: a figure of one case, or of the difference of two cases on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from condit.rulers.statistics import bootstrap


@dataclass(frozen=True)
class EditRow:
    """One figure with its 95 % interval, bootstrapped over concepts."""

    task: str
    measure: str
    case: str
    value: float
    low: float
    high: float
    n: int


def interval(task: str, measure: str, case: str, values: Tensor, clusters: Sequence[str]) -> EditRow:
    mean = bootstrap(values, clusters)
    return EditRow(task, measure, case, mean.value, mean.low, mean.high, mean.n)


def difference(one: str, other: str) -> str:
    """The case of a difference."""
    return f"{one} minus {other}"


def differences(
    task: str,
    measure: str,
    values: Mapping[str, Tensor],
    clusters: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> list[EditRow]:
    """Of the same pictures one by one, so that what they have in common drops out."""
    return [
        interval(task, measure, difference(one, other), values[one] - values[other], clusters)
        for one, other in pairs
        if one in values and other in values
    ]
