"""Curves of the style evaluation: a measure against the style score, a line a method over its strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from condit.rulers.plot import Line, Point
from condit.rulers.plot import curves as draw_curves
from condit.rulers.statistics import Interval
from condit_lab.suites.style_rulers import SCORE


def curves(result: Mapping[str, Any], measure: str) -> Image.Image:
    """Style score across, the measure up. Baselines start at no control. Copying is left out: it leaks so much that
    all others would be one point."""
    methods = [m for m in result["methods"] if result["shows"][m["name"]] == "style" and m["name"] != "copy"]
    points = {m["name"]: _points(result["rows"], m["name"], measure, m["name"] in result["swept"]) for m in methods}
    blanks = {m["baseline"]: m["blank"] for m in methods if m["baseline"]}
    lines = []
    for method in methods:
        name = method["name"]
        start = [replace(point, label="") for point in points.get(blanks.get(name, ""), [])]
        lines.append(Line(method["what"], [*start, *points[name]], baseline=name in blanks))
    return draw_curves(lines, SCORE, measure)


def _points(rows: Sequence[Mapping[str, Any]], method: str, measure: str, labelled: bool) -> list[Point]:
    """The method's points in the order of the strength."""
    by_measure = {(r["strength"], r["measure"]): r for r in rows if r["method"] == method}
    strengths = sorted({strength for strength, name in by_measure if name == measure})
    label = "{:g}" if labelled else ""
    return [
        Point(_interval(by_measure[s, SCORE]), _interval(by_measure[s, measure]), label.format(s)) for s in strengths
    ]


def _interval(row: Mapping[str, Any]) -> Interval:
    return Interval(row["value"], row["low"], row["high"], row["n"])
