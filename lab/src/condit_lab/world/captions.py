"""Captions of a drawing, made once: what it is, its measured colours, how it is drawn, in English and Chinese."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from condit_lab.icons.captions import with_article
from condit_lab.world.measure import COLOURS, PixelMeasures
from condit_lab.world.sets import Kind

PER_LANGUAGE = 3

_KINDS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "line": (("line icon", "outline icon"), ("线条图标", "轮廓图标")),
    "solid": (("solid icon", "filled icon", "glyph"), ("实心图标", "填充图标", "剪影图标")),
    "duotone": (("duotone icon", "two-tone icon"), ("双色调图标",)),
    "color": (("flat color icon", "color icon"), ("扁平彩色图标", "彩色图标")),
    "gradient": (("gradient icon", "glossy icon"), ("渐变图标", "光泽图标")),
    "sketch": (("hand-drawn icon", "sketch"), ("手绘图标", "草图")),
    "painted": (("painted illustration", "illustration"), ("手绘插画", "插画")),
    "pixel": (("pixel art icon", "pixel icon"), ("像素图标", "像素画")),
    "3d": (("3D icon", "3D render"), ("立体图标", "三维渲染")),
}


@dataclass(frozen=True)
class Subject:
    """All that a caption may say of one drawing. tags and descriptions are of one language each."""

    label_en: str
    label_zh: str
    style_en: str
    style_zh: str
    descriptions: Sequence[tuple[str, str]]
    tags_en: Sequence[str]
    tags_zh: Sequence[str]
    kind: Kind
    measured: PixelMeasures


def captions(subject: Subject, rng: Random) -> tuple[list[str], list[str]]:
    """(three English, three Chinese) captions: with the style's name, with colours and kind, with a description and
    tags."""
    return _english(subject, rng), _chinese(subject, rng)


def colour_words(measured: PixelMeasures) -> tuple[str, str]:
    """("red and white", "红色和白色") of the measured colours."""
    english = [COLOURS[index][0] for index in measured.colours]
    chinese = [COLOURS[index][1] for index in measured.colours]
    joined = english[0] if len(english) == 1 else f"{', '.join(english[:-1])} and {english[-1]}"
    return joined, chinese[0] if len(chinese) == 1 else f"{'、'.join(chinese[:-1])}和{chinese[-1]}"


def _english(subject: Subject, rng: Random) -> list[str]:
    colours, _ = colour_words(subject.measured)
    kind = rng.choice(_KINDS[subject.kind][0])
    named = with_article(subject.label_en) if rng.random() < 0.6 else subject.label_en
    first = rng.choice(("{}, {} style", "{} in {} style", "{}, {} icon")).format(subject.label_en, subject.style_en)
    second = rng.choice(
        (f"{colours} {kind} of {named}", f"{named}, {kind}, {colours}", f"{kind}: {subject.label_en}, {colours}")
    )
    parts = [named, rng.choice(subject.descriptions)[0] if subject.descriptions else kind, *_traits(subject, 0)]
    if subject.tags_en and rng.random() < 0.6:
        parts += rng.sample(list(subject.tags_en), min(len(subject.tags_en), rng.choice((1, 2))))
    return [first, second, ", ".join(parts)]


def _chinese(subject: Subject, rng: Random) -> list[str]:
    _, colours = colour_words(subject.measured)
    kind = rng.choice(_KINDS[subject.kind][1])
    first = rng.choice(("{}，{}风格", "{}风格的{}", "{}，{}图标"))
    swapped = first.startswith("{}风格的")
    pair = (subject.style_zh, subject.label_zh) if swapped else (subject.label_zh, subject.style_zh)
    second = rng.choice((f"{colours}的{subject.label_zh}，{kind}", f"{subject.label_zh}的{kind}，{colours}"))
    parts = [
        subject.label_zh,
        rng.choice(subject.descriptions)[1] if subject.descriptions else kind,
        *_traits(subject, 1),
    ]
    if subject.tags_zh and rng.random() < 0.6:
        parts += rng.sample(list(subject.tags_zh), min(len(subject.tags_zh), rng.choice((1, 2))))
    return [first.format(*pair), second, "，".join(parts)]


def _traits(subject: Subject, language: int) -> list[str]:
    traits = []
    if subject.measured.translucent:
        traits.append(("translucent parts", "半透明部分")[language])
    if subject.measured.shaded and subject.kind not in ("line", "solid", "duotone"):
        traits.append(("smooth shading", "柔和的明暗")[language])
    return traits
