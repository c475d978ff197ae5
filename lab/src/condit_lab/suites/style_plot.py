"""Curves of the style evaluation: a measure against the style score, a line a method over its strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from condit_lab.suites.report import FAINT, INK
from condit_lab.suites.style_rulers import SCORE

Point = tuple[Mapping[str, Any], Mapping[str, Any]]  # rows of style score and measure
Span = tuple[float, float]
# Drawn twice as large and brought down, which smooths the lines.
_SCALE, _WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 2, 620, 430, 62, 46, 300
_COLOURS = (
    (20, 20, 20),
    (31, 119, 180),
    (214, 90, 20),
    (44, 140, 60),
    (190, 40, 60),
    (120, 80, 170),
    (120, 90, 70),
    (0, 150, 160),
    (200, 80, 160),
    (140, 140, 20),
)


def curves(result: Mapping[str, Any], measure: str) -> Image.Image:
    """Style score across, the measure up, 95 % whiskers on both. A method of one strength is a point; baselines are
    thick and start at no control. Copying is left out: it leaks so much that beside it all others are one point."""
    methods = [m for m in result["methods"] if result["shows"][m["name"]] == "style" and m["name"] != "copy"]
    points = {m["name"]: _points(result["rows"], m["name"], measure) for m in methods}
    frame = _Frame.of([point for group in points.values() for point in group])
    size = (_LEFT + _WIDTH + _LEGEND) * _SCALE, (_HEIGHT + _BOTTOM + 12) * _SCALE
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    frame.draw(pen, SCORE, measure)
    baselines = {m["baseline"]: m["blank"] for m in methods if m["baseline"]}
    for number, method in enumerate(methods):
        name, colour = method["name"], _COLOURS[number % len(_COLOURS)]
        line = points[name]
        if name in baselines:
            colour, line = _COLOURS[0], [*points.get(baselines[name], []), *line]
        _draw_curve(pen, frame, line, colour, 3 if name in baselines else 1)
        if name in result["swept"]:
            _label(pen, frame, points[name], colour)
        top, left = (14 + 20 * number) * _SCALE, (_LEFT + _WIDTH + 14) * _SCALE
        pen.rectangle((left, top - 5 * _SCALE, left + 10 * _SCALE, top + 5 * _SCALE), colour)
        pen.text((left + 16 * _SCALE, top), method["what"], INK, font=_font(12), anchor="lm")
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


def _points(rows: Sequence[Mapping[str, Any]], method: str, measure: str) -> list[Point]:
    """The method's points in the order of the strength."""
    by_measure = {(r["strength"], r["measure"]): r for r in rows if r["method"] == method}
    strengths = sorted({strength for strength, name in by_measure if name == measure})
    return [(by_measure[s, SCORE], by_measure[s, measure]) for s in strengths]


def _font(size: int):
    return ImageFont.load_default(size * _SCALE)


@dataclass(frozen=True)
class _Frame:
    """The axes: which values they span."""

    x: Span
    y: Span

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Frame:
        def span(values: Sequence[float]) -> Span:
            """What holds the points and, of their whiskers, as much as lies near."""
            low, high = min(values), max(values)
            margin = 0.25 * (high - low or 1.0)
            return low - margin, high + margin

        return cls(span([x["value"] for x, _ in points]), span([y["value"] for _, y in points]))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place; what lies outside comes to the border."""
        across = (min(max(x, self.x[0]), self.x[1]) - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return (_LEFT + across * _WIDTH) * _SCALE, (8 + (1 - up) * _HEIGHT) * _SCALE

    def draw(self, pen: ImageDraw.ImageDraw, across: str, up: str) -> None:
        for part in range(6):
            x = self.x[0] + part / 5 * (self.x[1] - self.x[0])
            y = self.y[0] + part / 5 * (self.y[1] - self.y[0])
            pen.line((*self.at(x, self.y[0]), *self.at(x, self.y[1])), FAINT)
            pen.line((*self.at(self.x[0], y), *self.at(self.x[1], y)), FAINT)
            left, bottom = self.at(x, self.y[0])
            pen.text((left, bottom + 4 * _SCALE), f"{x:.2f}", INK, font=_font(10), anchor="ma")
            left, bottom = self.at(self.x[0], y)
            pen.text((left - 5 * _SCALE, bottom), f"{y:.2f}", INK, font=_font(10), anchor="rm")
        left, bottom = self.at(sum(self.x) / 2, self.y[0])
        pen.text((left, bottom + 22 * _SCALE), across, INK, font=_font(12), anchor="ma")
        left, top = self.at(self.x[0], self.y[1])
        pen.text((left + 6 * _SCALE, top + 2 * _SCALE), f"up: {up}", INK, font=_font(12), anchor="la")


def _draw_curve(
    pen: ImageDraw.ImageDraw, frame: _Frame, line: Sequence[Point], colour: tuple[int, int, int], width: int
) -> None:
    faint = tuple(round(c + (255 - c) * 0.75) for c in colour)
    for x, y in line:
        pen.line((*frame.at(x["low"], y["value"]), *frame.at(x["high"], y["value"])), faint, width=_SCALE)
        pen.line((*frame.at(x["value"], y["low"]), *frame.at(x["value"], y["high"])), faint, width=_SCALE)
    pen.line([frame.at(x["value"], y["value"]) for x, y in line], colour, width=width * _SCALE)
    for x, y in line:
        left, top = frame.at(x["value"], y["value"])
        pen.ellipse((left - 4 * _SCALE, top - 4 * _SCALE, left + 4 * _SCALE, top + 4 * _SCALE), colour)


def _label(pen: ImageDraw.ImageDraw, frame: _Frame, points: Sequence[Point], colour: tuple[int, int, int]) -> None:
    """The strength beside each point."""
    for x, y in points:
        left, top = frame.at(x["value"], y["value"])
        place = left + 7 * _SCALE, top - 7 * _SCALE
        pen.text(place, f"{x['strength']:g}", colour, font=_font(10), anchor="ls")
