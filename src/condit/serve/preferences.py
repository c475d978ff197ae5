"""The report of a preference study: Bradley-Terry scores with intervals, agreement, answers still needed."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from condit.serve.study import CHECK, key_of

Answers = Sequence[Mapping[str, object]]
Z = 1.96


@dataclass(frozen=True)
class PreferenceReport:
    """scores: of each method, natural log, mean 0, with the 95 % interval; a difference of 1 means a preference of
    73 %. agreement: the share of pairs of raters that gave the same answer to the same question, of `shared` such
    pairs; kappa: that, corrected for chance. needed: answers still needed until the closest neighbours differ."""

    scores: dict[str, tuple[float, float, float]]
    answers: int
    raters: dict[str, int]
    excluded: tuple[str, ...]
    agreement: float | None
    kappa: float | None
    shared: int
    neither: float
    needed: dict[tuple[str, str], int | None]


def wins_of(answers: Answers, methods: Sequence[str]) -> np.ndarray:
    """(M, M): how often row was preferred to column; an undecided answer is half of either."""
    index, wins = {method: i for i, method in enumerate(methods)}, np.zeros((len(methods), len(methods)))
    for answer in answers:
        left, right = index[str(answer["left"])], index[str(answer["right"])]
        share = {"left": 1.0, "right": 0.0}.get(str(answer["choice"]), 0.5)
        wins[left, right] += share
        wins[right, left] += 1 - share
    return wins


def bradley_terry(wins: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Scores (..., M) of mean 0 with P(i beats j) = sigmoid(s_i - s_j) from wins (..., M, M), by minorisation (Hunter
    2004, Eq. 3). Half a win for either side of each pair keeps scores finite where a method never loses."""
    wins = wins + 0.5 * (1 - np.eye(wins.shape[-1]))
    total, scores = wins + wins.swapaxes(-1, -2), np.zeros(wins.shape[:-1])
    for _ in range(rounds):
        strength = np.exp(scores)
        shared = total / (strength[..., :, None] + strength[..., None, :])
        scores = np.log(wins.sum(-1) / shared.sum(-1))
        scores -= scores.mean(-1, keepdims=True)
    return scores


def failed_checks(answers: Answers) -> list[str]:
    """Raters who preferred a spoilt picture in more than a quarter of their checks, of at least two."""
    checks: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        if CHECK in (answer["left"], answer["right"]):
            good = "left" if answer["right"] == CHECK else "right"
            checks[str(answer["rater"])].append(answer["choice"] == good)
    return sorted(rater for rater, right in checks.items() if len(right) > 1 and sum(right) < 0.75 * len(right))


def agreement(answers: Answers) -> tuple[float | None, float | None, int]:
    """Share of equal answers to the same question by two raters, Cohen's kappa over all such pairs, their number."""
    questions: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for answer in answers:
        chosen = str(answer["choice"])
        method = str(answer[chosen]) if chosen in ("left", "right") else "neither"
        questions[key_of(answer)][str(answer["rater"])] = method
    pairs = [(q, a, b) for q, given in questions.items() for a, b in itertools.combinations(given.values(), 2)]
    if not pairs:
        return None, None, 0
    same = sum(a == b for _, a, b in pairs) / len(pairs)
    # What raters would agree on by chance: first of the sorted pair, second, neither.
    kinds = [(q[1:].index(x) if x in q[1:] else 2) for q, a, b in pairs for x in (a, b)]
    chance = sum((kinds.count(k) / len(kinds)) ** 2 for k in range(3))
    return same, None if chance == 1 else (same - chance) / (1 - chance), len(pairs)


def report(answers: Answers, methods: Sequence[str], *, samples: int = 1000, seed: int = 0) -> PreferenceReport:
    """The report of all answers but those to checks and those of raters who failed them. Intervals are percentiles of
    `samples` bootstrap resamples of the questions, so that raters who saw the same question are not counted as
    independent. Raises ValueError without any answer."""
    excluded = failed_checks(answers)
    kept = [a for a in answers if CHECK not in (a["left"], a["right"]) and a["rater"] not in excluded]
    if not kept:
        raise ValueError("no answers yet; open `condit serve --study FOLDER` and give some")
    groups: dict[tuple[str, ...], list[Mapping[str, object]]] = defaultdict(list)
    for answer in kept:
        groups[key_of(answer)].append(answer)
    tables = np.stack([wins_of(group, methods) for group in groups.values()])
    scores, chance = bradley_terry(tables.sum(0)), np.random.default_rng(seed)
    drawn = chance.integers(0, len(tables), (samples, len(tables)))
    resampled = bradley_terry(np.stack([tables[index].sum(0) for index in drawn]), 60)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    order = [int(i) for i in np.argsort(-scores)]
    same, kappa, shared = agreement(kept)
    return PreferenceReport(
        {methods[i]: (float(scores[i]), float(low[i]), float(high[i])) for i in order},
        len(kept),
        {rater: sum(a["rater"] == rater for a in kept) for rater in sorted({str(a["rater"]) for a in kept})},
        tuple(excluded),
        same,
        kappa,
        shared,
        sum(a["choice"] == "neither" for a in kept) / len(kept),
        {
            (methods[i], methods[j]): still_needed(
                float(scores[i] - scores[j]), resampled[:, i] - resampled[:, j], len(kept)
            )
            for i, j in itertools.pairwise(order)
        },
    )


def still_needed(difference: float, resampled: np.ndarray, answers: int) -> int | None:
    """Answers until the 95 % interval of a difference leaves 0 out, if it stays as it is: the deviation falls with the
    root of their number. None where the difference is 0."""
    if abs(difference) < 1e-9:
        return None
    total = math.ceil(answers * (Z * float(resampled.std()) / difference) ** 2)
    return max(0, total - answers)


def as_text(found: PreferenceReport) -> str:
    """The report as Markdown."""
    lines = ["| method | score | 95 % interval |", "|---|---|---|"]
    lines += [f"| {method} | {s:+.2f} | {low:+.2f} to {high:+.2f} |" for method, (s, low, high) in found.scores.items()]
    raters = ", ".join(f"{rater} ({count})" for rater, count in found.raters.items())
    lines += ["", f"{found.answers} answers by {len(found.raters)} raters: {raters}. Undecided: {found.neither:.0%}."]
    if found.excluded:
        lines.append(f"Left out, because they failed the checks: {', '.join(found.excluded)}.")
    if found.agreement is None:
        lines.append("No question was answered by two raters, so there is no agreement yet.")
    else:
        kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
        lines.append(f"Agreement of two raters: {found.agreement:.0%}{kappa}, {found.shared} pairs of answers.")
    for (first, second), count in found.needed.items():
        if count == 0:
            lines.append(f"{first} and {second} differ.")
        else:
            text = "no number of answers is expected to" if count is None else f"about {count} more answers"
            lines.append(f"{first} and {second}: {text} separate them.")
    return "\n".join(lines)
