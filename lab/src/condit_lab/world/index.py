"""Rows of the world before anything is drawn: which icon of which set shows which concept in which style."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from condit_lab.icons.packages import square_svg
from condit_lab.icons.styles import STYLES as EMOJI_STYLES
from condit_lab.icons.world import HELD_OUT_STYLE, Icon
from condit_lab.world import clipart, inflated
from condit_lab.world.emoji import EmojiConcept
from condit_lab.world.names import Phrase, read_name
from condit_lab.world.sets import Look, PackageSet, drawings_of, icon_sets, looks
from condit_lab.world.splits import HELD_OUT_LOOKS, split_of


@dataclass(frozen=True)
class WorldDrawing:
    """One icon to be drawn. name = the icon's name in `source`, the set or emoji style it comes from; fixed = its split
    is the first world's."""

    style: str
    source: str
    name: str
    concept: str
    label_en: str
    label_zh: str
    detail: bool
    group: str
    split: str
    licence: str
    fixed: bool

    @property
    def key(self) -> str:
        """Name in the raster cache of its style: two sets may draw one style."""
        return f"{self.source}/{self.name}"


def emoji_rows_as_drawings(icons: Iterable[Icon], concepts: Mapping[str, EmojiConcept]) -> list[WorldDrawing]:
    """The first world's rows."""
    return [
        WorldDrawing(
            icon.style,
            icon.style,
            icon.icon,
            icon.base,
            icon.label,
            concepts[icon.hex].label_zh or icon.label,
            icon.hex != icon.base,
            icon.group,
            icon.split,
            icon.licence,
            True,
        )
        for icon in icons
    ]


def read_set(tarball: Path) -> dict:
    """An iconify package's `icons.json`."""
    with tarfile.open(tarball, "r:gz") as tar:
        handle = tar.extractfile("package/icons.json")
        if handle is None:
            raise ValueError(f"{tarball} has no file package/icons.json. Remove it and fetch the pinned version again.")
        return json.load(handle)


def set_rows(
    icon_set: PackageSet, tarball: Path, known: Mapping[str, Phrase], groups: Mapping[str, str]
) -> list[WorldDrawing]:
    """The rows of one set whose names lead to a concept; their split is still "train". groups: concept -> group."""
    names = [name for name, icon in read_set(tarball)["icons"].items() if not icon.get("hidden")]
    out = []
    for style, stem, name in drawings_of(icon_set.key, names):
        reading = read_name(stem, icon_set.key, known)
        if reading is not None:
            out.append(
                WorldDrawing(
                    style,
                    icon_set.key,
                    name,
                    reading.phrase.concept,
                    reading.label_en,
                    reading.label_zh,
                    bool(reading.details),
                    groups.get(reading.phrase.concept, "things"),
                    "train",
                    icon_set.licence,
                    False,
                )
            )
    return out


def clipart_rows(deb: Path, known: Mapping[str, Phrase], groups: Mapping[str, str]) -> list[WorldDrawing]:
    """The rows of Open Clip Art."""
    return [
        WorldDrawing(
            clip.style,
            clipart.SOURCE,
            clip.path,
            clip.phrase.concept,
            clip.phrase.label_en,
            clip.phrase.label_zh,
            False,
            groups.get(clip.phrase.concept, "things"),
            "train",
            clipart.LICENCE,
            False,
        )
        for clip in clipart.clips(deb, known)
    ]


def inflated_rows(drawings: Iterable[WorldDrawing]) -> list[WorldDrawing]:
    """One blown-up shape for every plain drawing of the style that lends its silhouettes."""
    shapes = [row for row in drawings if row.style == inflated.SHAPES and not row.detail]
    return [replace(row, style=inflated.STYLE, source=inflated.STYLE) for row in shapes]


def documents(tarball: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, SVG document) of one set's icons."""
    data = read_set(tarball)
    for name in names:
        icon = data["icons"][name]
        width, height = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
        yield name, square_svg(icon["body"], icon.get("left", 0), icon.get("top", 0), width, height)


def families() -> dict[str, str]:
    """Style -> family, of all styles."""
    own = {key: style.family for key, style in EMOJI_STYLES.items()}
    sets = icon_sets()
    return own | {look.key: sets[look.icon_set].family if look.icon_set in sets else look.icon_set for look in looks()}


def look_table() -> dict[str, Look]:
    """Style -> its row, of the new styles."""
    table: dict[str, Look] = {}
    for look in looks():
        table.setdefault(look.key, look)
    return table


def with_splits(drawings: list[WorldDrawing]) -> list[str]:
    """The split of every drawing before near-duplicates are looked at."""
    family = families()
    drawn_by: dict[str, set[str]] = {}
    for drawing in drawings:
        if drawing.style not in HELD_OUT_LOOKS and drawing.style != HELD_OUT_STYLE:
            drawn_by.setdefault(drawing.concept, set()).add(family[drawing.style])
    return [
        drawing.split
        if drawing.fixed
        else split_of(drawing.concept, drawing.style, family[drawing.style], drawn_by.get(drawing.concept, ()))
        for drawing in drawings
    ]
