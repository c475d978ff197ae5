"""Figures of methods with intervals, their comparison at equal style, and whether rulers agree with people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from condit.rulers.folder import Output, label
from condit.rulers.measure import RULERS, Values
from condit.rulers.statistics import Gap, Interval, against_curve, bootstrap, holm, needed, spearman

Key = tuple[str, float | None]
LESS_BLANK = ("label", "likeness")  # what a picture has of a reference is what the same noise has not without one
SIDES = {"left": 1.0, "right": -1.0, "neither": 0.0}


@dataclass(frozen=True)
class Comparison:
    """A method at a strength against the baseline's curve at the same style. p: after Holm, over all comparisons of the
    report. needed: how many pictures tell a difference of 0.05."""

    method: str
    strength: float | None
    ruler: str
    gap: Gap
    verdict: str
    p: float | None
    needed: int | None
    n: int


def rows_of(outputs: Sequence[Output]) -> dict[Key, NDArray]:
    """The numbers of each method's outputs at each strength, in the order of the strength."""
    groups: dict[Key, list[int]] = defaultdict(list)
    for i, output in enumerate(outputs):
        groups[output.key].append(i)
    order = sorted(groups, key=lambda key: (key[0], -np.inf if key[1] is None else key[1]))
    return {key: np.array(groups[key]) for key in order}


def less_blank(values: Values, outputs: Sequence[Output], blank: str | None) -> Values:
    """Leakage and likeness less those of the blank method's picture of the same name; NaN where it has none."""
    numbers = {o.name: i for i, o in enumerate(outputs) if o.method == blank}
    if not numbers:
        return values
    mine = np.array([numbers.get(o.name, -1) for o in outputs])
    return {
        name: np.where(mine >= 0, row - row[mine], np.nan) if RULERS[name].of in LESS_BLANK else row
        for name, row in values.items()
    }


def figures(values: Values, outputs: Sequence[Output]) -> dict[tuple[Key, str], Interval]:
    """The mean of every ruler for every method and strength. Intervals: 95 %, bootstrap over contents; of one content
    there is none: low and high are NaN."""
    found = {}
    for key, index in rows_of(outputs).items():
        for name, row in values.items():
            chosen = index[np.isfinite(row[index])]
            clusters = [outputs[i].cluster for i in chosen]
            if len(set(clusters)) > 1:
                found[key, name] = bootstrap(row[chosen], clusters)
            elif clusters:
                found[key, name] = Interval(float(row[chosen].mean()), np.nan, np.nan, len(clusters))
    return found


def comparisons(
    values: Values, outputs: Sequence[Output], axis: str, baseline: str, blank: str | None, compared: Sequence[str]
) -> list[Comparison]:
    """Every other method at every strength against the baseline's curve, which starts at the blank method. Only
    pictures of names that all of them have count. [] for a baseline with fewer than two points."""
    rows = rows_of(outputs)
    points = [key for key in rows if key[0] == blank] + [key for key in rows if key[0] == baseline]
    if len(points) < 2:
        return []
    found: list[Comparison] = []
    for key in (key for key in rows if key[0] not in (baseline, blank)):
        for ruler in compared:
            chosen = common([rows[k] for k in (*points, key)], outputs, (values[axis], values[ruler]))
            if len(chosen[0]) < 2:
                continue
            curve, mine = chosen[:-1], chosen[-1]
            styles, others = ([v[index] for index in curve] for v in (values[axis], values[ruler]))
            clusters = [outputs[i].cluster for i in mine]
            sign = 1 if RULERS[axis].more else -1
            styles = [sign * style for style in styles]
            gap = against_curve(styles, others, sign * values[axis][mine], values[ruler][mine], clusters)
            many = None if gap.low is None or gap.high is None else needed(len(mine), gap.low, gap.high)
            verdict = gap.verdict(RULERS[ruler].more)
            found.append(Comparison(*key, ruler, gap, verdict, gap.p, many, len(mine)))
    tested = [i for i, c in enumerate(found) if c.p is not None]
    for i, p in zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True):
        found[i] = replace(found[i], p=p, verdict=found[i].verdict if p < 0.05 else "even")
    return found


def common(groups: Sequence[NDArray], outputs: Sequence[Output], rows: Sequence[NDArray]) -> list[NDArray]:
    """Of every group the outputs whose names all groups have with finite values, in one order."""
    named = [{outputs[i].name: i for i in group if all(np.isfinite(r[i]) for r in rows)} for group in groups]
    names = sorted(set.intersection(*(set(group) for group in named)))
    return [np.array([group[name] for name in names], dtype=np.int64) for group in named]


@dataclass(frozen=True)
class Agreement:
    """A ruler against people: the share of their preferences that it has too (a tie is half), and the correlation of
    ranks (Spearman) of its differences with their answers; 95 % by bootstrap over the pictures."""

    share: Interval
    correlation: Interval
    answers: int


def human(
    values: Values, outputs: Sequence[Output], answers: Sequence[Mapping[str, object]], *, seed: int = 0
) -> dict[str, Agreement]:
    """Ruler -> its agreement with the answers of a preference study, whose methods are METHOD or "METHOD STRENGTH", or
    METHOD/STRENGTH, and whose items are names. Answers about other pictures are left out."""
    place: dict[tuple[str, str], int] = {}
    for i, o in enumerate(outputs):
        for method in (o.method, label(o.method, o.strength), label(o.method, o.strength).replace(" ", "/")):
            place.setdefault((method, o.name.rpartition("/")[2]), i)
    known = [
        (place[left], place[right], SIDES[str(a["choice"])], str(a["item"]))
        for a in answers
        if (left := (str(a["left"]), str(a["item"]))) in place
        and (right := (str(a["right"]), str(a["item"]))) in place
        and str(a["choice"]) in SIDES
    ]
    found = {}
    for name, row in values.items():
        sign = 1.0 if RULERS[name].more else -1.0
        kept = [(sign * (row[i] - row[j]), said, item) for i, j, said, item in known if np.isfinite(row[i] - row[j])]
        if len(kept) < 2:
            continue
        difference, said = np.array([x[0] for x in kept]), np.array([x[1] for x in kept])
        agreed = (1 + np.sign(difference) * said) / 2  # a tie, of either, is half
        items = np.unique([x[2] for x in kept], return_inverse=True)[1]
        drawn = np.random.default_rng(seed).integers(0, items.max() + 1, (400, items.max() + 1))
        members = [np.flatnonzero(items == k) for k in range(items.max() + 1)]
        resampled = [np.concatenate([members[k] for k in row_of]) for row_of in drawn]
        correlations = np.array([spearman(difference[i], said[i]) for i in resampled])
        finite = correlations[np.isfinite(correlations)]
        low, high = np.percentile(finite, [2.5, 97.5]) if finite.size else (np.nan, np.nan)
        share = bootstrap(agreed, items.tolist(), seed=seed)
        found[name] = Agreement(
            share, Interval(spearman(difference, said), float(low), float(high), len(kept)), len(kept)
        )
    return found
