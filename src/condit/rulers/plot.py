"""Curves of methods over their strengths: a measure against style, a line a method, with 95 % whiskers on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from condit.rulers.statistics import Interval

INK, FAINT = (32, 32, 32), (225, 225, 225)
Colour = tuple[int, ...]
# Drawn twice as large and brought down, which smooths the lines.
_SCALE, _WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 2, 620, 430, 62, 46, 300
_COLOURS: tuple[Colour, ...] = (
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


@dataclass(frozen=True)
class Point:
    """A method at a strength: where it lies, and what is written beside it."""

    x: Interval
    y: Interval
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A method: its points in the order of the strength. A baseline is thick and black."""

    name: str
    points: Sequence[Point]
    baseline: bool = False


def curves(lines: Sequence[Line], across: str, up: str) -> Image.Image:
    """One picture of all lines; `across` and `up` name the axes. A method of one strength is a point."""
    frame = _Frame.of([point for line in lines for point in line.points])
    height = max(_HEIGHT + _BOTTOM + 12, 20 * len(lines) + 20)
    image = Image.new("RGB", ((_LEFT + _WIDTH + _LEGEND) * _SCALE, height * _SCALE), "white")
    pen = ImageDraw.Draw(image)
    frame.draw(pen, across, up)
    for number, line in enumerate(lines):
        colour = _COLOURS[0] if line.baseline else _COLOURS[number % len(_COLOURS)]
        _draw_curve(pen, frame, line.points, colour, 3 if line.baseline else 1)
        for point in line.points:
            left, top = frame.at(point.x.value, point.y.value)
            pen.text((left + 7 * _SCALE, top - 7 * _SCALE), point.label, colour, font=_font(10), anchor="ls")
        top, left = (14 + 20 * number) * _SCALE, (_LEFT + _WIDTH + 14) * _SCALE
        pen.rectangle((left, top - 5 * _SCALE, left + 10 * _SCALE, top + 5 * _SCALE), colour)
        pen.text((left + 16 * _SCALE, top), line.name, INK, font=_font(12), anchor="lm")
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


def _font(size: int):
    return ImageFont.load_default(size * _SCALE)


@dataclass(frozen=True)
class _Frame:
    """The axes: which values they span."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Frame:
        def span(values: Sequence[float]) -> tuple[float, float]:
            """What holds the points and, of their whiskers, as much as lies near."""
            low, high = min(values), max(values)
            margin = 0.25 * (high - low or 1.0)
            return low - margin, high + margin

        return cls(span([point.x.value for point in points]), span([point.y.value for point in points]))

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


def _draw_curve(pen: ImageDraw.ImageDraw, frame: _Frame, points: Sequence[Point], colour: Colour, width: int) -> None:
    faint = tuple(round(c + (255 - c) * 0.75) for c in colour)
    for point in points:
        x, y = point.x, point.y
        pen.line((*frame.at(x.low, y.value), *frame.at(x.high, y.value)), faint, width=_SCALE)
        pen.line((*frame.at(x.value, y.low), *frame.at(x.value, y.high)), faint, width=_SCALE)
    pen.line([frame.at(point.x.value, point.y.value) for point in points], colour, width=width * _SCALE)
    for point in points:
        left, top = frame.at(point.x.value, point.y.value)
        pen.ellipse((left - 4 * _SCALE, top - 4 * _SCALE, left + 4 * _SCALE, top + 4 * _SCALE), colour)
