"""The tables of the style evaluation: every method's figures, and each against its baseline's curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from condit.rulers import statistics
from condit_lab.suites.style_rulers import MEASURES, SCORE

BLANK_STRENGTH = 1.0  # methods without a strength stand at 1


@dataclass(frozen=True)
class MethodRow:
    """One figure of a method at a strength: the mean and its 95 % interval over n pictures."""

    method: str
    strength: float
    measure: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """A method at a strength against its baseline's curve at the same style (`style_measures.Gap`)."""

    method: str
    strength: float
    baseline: str
    measure: str
    verdict: str
    gap: statistics.Gap


@dataclass(frozen=True)
class PairedDifference:
    """A method less another, picture by picture: the mean difference and its 95 % interval over n pictures."""

    method: str
    strength: float
    other: str
    other_strength: float
    measure: str
    value: float
    low: float
    high: float
    n: int


Table = Mapping[tuple[str, float], Mapping[str, Tensor]]  # (method, strength) -> measure -> (N,)


def less_blank(values: Mapping[str, Tensor], blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Increases: what the same noise and prompt have without a reference taken off."""
    taken = {m.name for m in MEASURES if m.increase}
    return {name: value - blank[name] if name in taken else value for name, value in values.items()}


def rows(table: Table, clusters: Sequence[str], shows: Mapping[str, str]) -> list[MethodRow]:
    """shows: method -> "style" or "subject"; a subject's reference has no style to be found and no concept to leak."""
    entries = []
    for (method, strength), values_of in table.items():
        for measure in MEASURES:
            if measure.name not in values_of or (measure.of_style and shows[method] != "style"):
                continue
            mean = statistics.bootstrap(values_of[measure.name], clusters)
            value, low, high = (round(x, 4) for x in (mean.value, mean.low, mean.high))
            entries.append(MethodRow(method, strength, measure.name, value, low, high, mean.n))
    return entries


def comparisons(table: Table, clusters: Sequence[str], held: Mapping[str, tuple[str | None, str]]) -> list[Comparison]:
    """Every point of every method with a baseline, against that baseline's curve; held: method -> (baseline, blank).
    The curve starts at no control, which is the adapter at strength 0. A baseline's own points are not compared."""
    entries = []
    for (method, strength), values_of in table.items():
        baseline, blank = held[method]
        if baseline is None or method in (baseline, blank):
            continue
        points = sorted(s for m, s in table if m == baseline)
        curve = [table[key] for key in [(blank, BLANK_STRENGTH), *((baseline, s) for s in points)]]
        for measure in (m for m in MEASURES if m.compared and m.name in values_of):
            styles = [point[SCORE] for point in curve]
            others = [point[measure.name] for point in curve]
            gap = statistics.against_curve(styles, others, values_of[SCORE], values_of[measure.name], clusters)
            # Likeness to the reference has no good side of its own; less of it at equal style is less copying.
            entries.append(Comparison(method, strength, baseline, measure.name, gap.verdict(bool(measure.more)), gap))
    return entries


def pairs(table: Table, clusters: Sequence[str]) -> list[PairedDifference]:
    """Every method less those before it in the table, at every strength: for methods that have no curve in common."""
    entries = []
    names = [m.name for m in MEASURES if not m.of_style]
    for (other, at), (method, strength) in combinations(table, 2):
        if method != other:
            for measure in names:
                less = table[method, strength][measure] - table[other, at][measure]
                mean = statistics.bootstrap(less, clusters)
                value, low, high = (round(x, 4) for x in (mean.value, mean.low, mean.high))
                entries.append(PairedDifference(method, strength, other, at, measure, value, low, high, mean.n))
    return entries


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as Markdown: every method, then each against the baseline's curve, then the rulers."""
    names = {entry["name"]: entry["what"] for entry in result["methods"]}
    lines = [
        f"`{result['command']}`: n = {result['n']} pictures of {result['concepts']} concepts, "
        f"{result['seconds']['drawing']:.0f} s of drawing; {_models(result)}. In brackets: 95 %, bootstrap over "
        "concepts.",
        "",
        *_methods_table(result, names),
        "",
        f"Chance of style retrieval: {result['retrieval_chance']:.3f}.",
        "",
        "Against the baseline's curve at the same style score: difference (95 %). *even*: the interval covers 0; "
        "*beyond*: share of resamples in which the style lies beyond the curve's ends.",
        "",
        *_comparison_table(result, names),
    ]
    if result["pairs"]:
        lines += ["", "Shown the subject, picture by picture: difference (95 %).", "", *_pairs_table(result, names)]
    if result["probe"]:
        lines += ["", f"Block probe, {result['probe'][0]['n']} other pictures, attention at one layer, strength 1:", ""]
        lines += ["| layer | style score, increase | leakage, increase |", "|---|---|---|"]
        lines += [f"| `{x['site']}` | {x['style']:+.3f} | {x['leakage']:+.3f} |" for x in result["probe"]]
        lines += ["", f"Style block: {', '.join(f'`{site}`' for site in result['sites'])}."]
    if result["rulers"]:
        lines += ["", f"Rulers, on {result['rulers'][0]['icons']} real icons (area under the ROC; 0.5 = blind):", ""]
        lines += ["| ruler | same style | same concept |", "|---|---|---|"]
        lines += [
            f"| {x['ruler']} | {_figure(x.get('style'))} | {_figure(x.get('concept'))} |" for x in result["rulers"]
        ]
    lines += ["", *(f"Left out: {x['method']} ({x['why']})." for x in result["skipped"])]
    return "\n".join(lines).rstrip() + "\n"


def _models(result: Mapping[str, Any]) -> str:
    return ", ".join(f"model {name} {digest}" for name, digest in result["models"].items())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _methods_table(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    shown = [m.name for m in MEASURES if any(row["measure"] == m.name for row in result["rows"])]
    lines = [f"| method | strength | {' | '.join(shown)} |", f"|---|---|{'---|' * len(shown)}"]
    for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in result["rows"]):
        by_measure = {r["measure"]: r for r in result["rows"] if (r["method"], r["strength"]) == (method, strength)}
        cells = [
            f"{r['value']:.3f} ({r['low']:.2f} to {r['high']:.2f})" if (r := by_measure.get(m)) else "" for m in shown
        ]
        at = f"{strength:g}" if method in result["swept"] else ""
        lines.append(f"| {names[method]} | {at} | {' | '.join(cells)} |")
    return lines


def _comparison_table(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    shown = list(dict.fromkeys(x["measure"] for x in result["comparisons"]))
    lines = [
        f"| method | strength | style score | beyond | {' | '.join(shown)} |",
        f"|---|---|---|---|{'---|' * len(shown)}",
    ]
    for method, strength in dict.fromkeys((x["method"], x["strength"]) for x in result["comparisons"]):
        by_measure = {
            x["measure"]: x for x in result["comparisons"] if (x["method"], x["strength"]) == (method, strength)
        }
        gap = next(iter(by_measure.values()))["gap"]
        at = f"{strength:g}" if method in result["swept"] else ""
        cells = " | ".join(_gap(by_measure[m]) for m in shown)
        lines.append(f"| {names[method]} | {at} | {gap['style']:.3f} | {gap['outside']:.0%} | {cells} |")
    return lines


def _pairs_table(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    shown = list(dict.fromkeys(x["measure"] for x in result["pairs"]))
    lines = [f"| method | less | at strength | {' | '.join(shown)} |", f"|---|---|---|{'---|' * len(shown)}"]
    keys = ("method", "strength", "other", "other_strength")
    for key in dict.fromkeys(tuple(x[k] for k in keys) for x in result["pairs"]):
        by_measure = {x["measure"]: x for x in result["pairs"] if tuple(x[k] for k in keys) == key}
        cells = " | ".join(
            f"{x['value']:+.3f} ({x['low']:+.2f} to {x['high']:+.2f})" for x in map(by_measure.__getitem__, shown)
        )
        lines.append(f"| {names[key[0]]} | {names[key[2]]} | {key[3]:g} | {cells} |")
    return lines


def _gap(entry: Mapping[str, Any]) -> str:
    gap = entry["gap"]
    if gap["difference"] is None:
        return f"{gap['side']} the curve"
    return f"{gap['difference']:+.3f} ({gap['low']:+.2f} to {gap['high']:+.2f}) {entry['verdict']}"


def as_json(entries: Sequence[MethodRow] | Sequence[Comparison] | Sequence[PairedDifference]) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in entries]
