"""Procedural icon styles: one sampled style, applied to any icons, makes them look like one designer's set.

Vendors give about nine independent styles; these give as many as training wants, each with words that describe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

RGB = tuple[int, int, int]
Field = np.ndarray  # float32, 0..1
Fill = Literal["keep", "tones", "palette", "solid", "gradient", "dots", "hatch", "none"]
Effect = Literal["none", "shadow", "sticker", "glow", "puffy", "pixels"]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Grade:
    """How kept colours change: levels of lightness (0 = smooth), negative, hue = turn of the colour circle in radians,
    saturation (1 = as it is), pastel = share of white."""

    levels: int = 0
    saturation: float = 1.0
    pastel: float = 0.0
    hue: float = 0.0
    negative: bool = False


@dataclass(frozen=True)
class Procedural:
    """One style. Colours are RGB 0..255, lengths pixels of a 128 px canvas; background has one colour, or two for a
    vertical gradient; line None draws no line; words describe the style in a few words."""

    words_en: str
    words_zh: str
    fill: Fill
    colours: tuple[RGB, ...] = ()
    line: RGB | None = None
    width: float = 2.0
    inner: bool = True
    background: tuple[RGB, ...] = ((255, 255, 255),)
    badge: RGB | None = None
    effect: Effect = "none"
    grade: Grade = Grade()
    period: float = 7.0  # of dots and hatching
    scale: float = 0.9

    @classmethod
    def sample(cls, rng: Random) -> Procedural:
        """A random style."""
        from condit_lab.icons.procedural_recipes import RECIPES  # here, because the recipes make objects of this class

        recipes, weights = zip(*RECIPES, strict=True)
        return rng.choices(recipes, weights)[0](rng)

    def apply(self, rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An icon with straight alpha, (S, S, 4) uint8, drawn in this style: (S, S, 3) uint8."""
        colour, alpha = _layers(_shrunk(rgba, self.scale * (0.72 if self.badge else 1.0)))
        inside = outer = np.zeros_like(alpha)
        if self.line is not None or self.fill in ("solid", "gradient"):
            inside, outer = _edges(colour, alpha, self.width, self.inner)
        out = self._paper(alpha)
        filled = self._filled(colour, alpha)
        if self.effect == "puffy":
            filled = np.clip(filled + _relief(alpha)[..., None], 0, 1)
        if filled.shape[-1]:
            out = _over(out, filled, alpha)
        if self.fill in ("solid", "gradient"):
            # A silhouette keeps its drawing as lines cut out of it.
            paper = self.badge or self.background[0]
            out = _over(out, _flat(paper), inside * (alpha > 0.5))
        if self.line is not None:
            lines = np.maximum(inside * (alpha > 0.02), outer)
            if self.effect == "glow":
                out = _over(out, _flat(self.line), np.clip(_blur(lines, 5) * 1.1, 0, 0.75))
            out = _over(out, _flat(self.line), lines)
        image = (np.clip(out, 0, 1) * 255 + 0.5).astype(np.uint8)
        return _pixels(image) if self.effect == "pixels" else image

    def _paper(self, alpha: Field) -> Field:
        """Background, badge, and what lies between them and the drawing."""
        side = alpha.shape[0]
        top, bottom = _flat(self.background[0]), _flat(self.background[-1])
        ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        out = np.broadcast_to(top + (bottom - top) * ramp, (side, side, 3))
        if self.badge is not None:
            out = _over(out, _flat(self.badge), _disc(side))
        if self.effect in ("shadow", "sticker"):
            border = _grown(alpha, 4.5) if self.effect == "sticker" else alpha
            shift = max(2, round(side * 0.03))
            out = _over(out, np.zeros(3, np.float32), np.roll(_blur(border, 2.5), (shift, shift // 2), (0, 1)) * 0.32)
            if self.effect == "sticker":
                out = _over(out, np.ones(3, np.float32), border)
        return out

    def _filled(self, colour: Field, alpha: Field) -> Field:
        """Colours of the drawing, (S, S, 3), or one colour (3,), or nothing (0,)."""
        if self.fill == "none":
            return np.empty(0, np.float32)
        if self.fill == "solid":
            return _flat(self.colours[0])
        if self.fill == "gradient":
            rows = np.flatnonzero(alpha.max(1) > 0.1)
            first, last = (rows[0], rows[-1]) if rows.size else (0, alpha.shape[0] - 1)
            ramp = np.clip((np.arange(alpha.shape[0], dtype=np.float32) - first) / max(1, last - first), 0, 1)
            start, end = _flat(self.colours[0]), _flat(self.colours[-1])
            return np.broadcast_to((start + (end - start) * ramp[:, None])[:, None], colour.shape)
        if self.fill == "palette":
            # 16 levels a channel are enough to find the nearest of a few colours.
            cells = (_smooth(colour) * 15.99).astype(np.intp)
            return _nearest(self.colours)[cells[..., 0] * 256 + cells[..., 1] * 16 + cells[..., 2]]
        if self.fill == "keep":
            return self._kept(colour)
        light = colour @ _LUMA
        if self.fill == "tones":
            return _tones(self.colours, self.grade.levels)[np.clip(light * 255, 0, 255).astype(np.intp)]
        screen = _screen(alpha.shape[0], self.period, self.fill == "hatch")
        ink = np.clip((0.92 - light * 0.85 - screen) * self.period * 0.9 + 0.5, 0, 1)
        return _over(np.broadcast_to(_flat(self.colours[1]), colour.shape), _flat(self.colours[0]), ink)

    def _kept(self, colour: Field) -> Field:
        if self.grade.levels:
            # Steps of lightness, not of each channel: tan must not turn pink.
            colour = _smooth(colour)
            light = (colour @ _LUMA)[..., None]
            steps = self.grade.levels - 1
            colour = np.clip(colour * (np.round(light * steps + 0.15) / steps / np.maximum(light, 0.04)), 0, 1)
        if self.grade.negative:
            colour = 1 - colour
        if self.grade.hue or self.grade.saturation != 1:
            colour = colour @ _turn(self.grade.hue, self.grade.saturation)
        return np.clip(colour, 0, 1) * (1 - self.grade.pastel) + self.grade.pastel


def _flat(rgb: Sequence[int]) -> Field:
    return np.asarray(rgb, np.float32) / 255


def _over(below: Field, colour: Field, alpha: Field) -> Field:
    return below + (colour - below) * alpha[..., None]


def _shrunk(rgba: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    side = rgba.shape[0]
    inner = round(side * scale)
    if rgba.shape != (side, side, 4) or rgba.dtype != np.uint8:
        raise ValueError(f"An icon must be (S, S, 4) uint8 with alpha; found {rgba.shape} {rgba.dtype}.")
    canvas = Image.new("RGBA", (side, side))
    small = Image.fromarray(rgba).resize((inner, inner), Image.Resampling.BILINEAR)
    canvas.paste(small, ((side - inner) // 2,) * 2)
    return np.asarray(canvas)


def _layers(rgba: NDArray[np.uint8]) -> tuple[Field, Field]:
    """Straight colour (S, S, 3) and alpha (S, S), 0..1."""
    layers = rgba.astype(np.float32) / 255
    return layers[..., :3], layers[..., 3]


def _blur(field: Field, sigma: float) -> Field:
    image = Image.fromarray((np.clip(field, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), np.float32) / 255


def _smooth(colour: Field) -> Field:
    """Without the grain of gradients, so that steps have clean borders."""
    return _blur(colour, 0.8)


def _grown(alpha: Field, by: float) -> Field:
    """The shape grown by about `by` pixels, with soft borders."""
    return np.clip((_blur(alpha, by * 0.75) - 0.09) * (1.6 + by), 0, 1)


def _edges(colour: Field, alpha: Field, width: float, inner: bool) -> tuple[Field, Field]:
    """Lines between the colours inside the drawing, and the line around it, each 0..1."""
    outer = np.clip(_grown(alpha, width * 0.85) - np.clip(alpha * 3 - 2, 0, 1), 0, 1)
    if not inner:
        return np.zeros_like(alpha), outer
    solid = _blur(colour * alpha[..., None] + 0.5 * (1 - alpha[..., None]), 0.9)
    steps = np.zeros_like(alpha)
    steps[:, 1:-1] = _largest(np.abs(solid[:, 2:] - solid[:, :-2]))
    steps[1:-1] = np.maximum(steps[1:-1], _largest(np.abs(solid[2:] - solid[:-2])))
    edges = np.clip((steps - 0.10) * 6, 0, 1) * np.clip(_blur(alpha, 1.2) * 4 - 3, 0, 1)
    if width > 1.6:
        edges = np.clip(_blur(edges, width * 0.3) * (1.1 + width * 0.22), 0, 1)
    return edges, outer


def _largest(channels: Field) -> Field:
    # Five times as fast as .max(-1) over an axis of three.
    return np.maximum(np.maximum(channels[..., 0], channels[..., 1]), channels[..., 2])


def _relief(alpha: Field) -> Field:
    """Light from the upper left on a drawing that bulges, about -0.3..0.3."""
    height = _blur(alpha, 5)
    down, right = np.gradient(height)
    return np.clip((down + right) * 4, -0.28, 0.35)


def _pixels(image: NDArray[np.uint8], side: int = 32) -> NDArray[np.uint8]:
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize(image.shape[:2], Image.Resampling.NEAREST))


def _turn(angle: float, saturation: float) -> Field:
    """Matrix on the right of RGB rows: turn around the grey axis, scale the distance from it."""
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / np.sqrt(3)
    turned = np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * cross
    return (grey + saturation * turned).astype(np.float32)


@lru_cache(maxsize=256)
def _tones(stops: tuple[RGB, ...], levels: int) -> Field:
    """Colour of every luminance, (256, 3)."""
    light = np.linspace(0, 1, 256)
    if levels:
        light = np.round(light * (levels - 1)) / (levels - 1)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(light, at, [stop[c] / 255 for stop in stops]) for c in range(3)], 1).astype(np.float32)


@lru_cache(maxsize=256)
def _nearest(colours: tuple[RGB, ...]) -> Field:
    """The nearest of the colours for each of 16 x 16 x 16 cells, (4096, 3)."""
    cells = np.stack(np.meshgrid(*[np.arange(16) / 15] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    choice = np.array(colours) / 255
    return choice[((cells - choice) ** 2).sum(-1).argmin(1)].astype(np.float32)


@lru_cache(maxsize=64)
def _screen(side: int, period: float, hatch: bool) -> Field:
    """A printer's screen turned by 45 degrees, 0..1: dots or hatching."""
    row, column = np.mgrid[:side, :side] * (2 * np.pi / period / np.sqrt(2))
    first, second = np.cos(row + column), np.cos(row - column)
    return ((first if hatch else (first + second) / 2) * 0.5 + 0.5).astype(np.float32)


@lru_cache(maxsize=8)
def _disc(side: int) -> Field:
    row, column = np.mgrid[:side, :side] - (side - 1) / 2
    return np.clip(side * 0.47 - np.hypot(row, column) + 0.5, 0, 1).astype(np.float32)
