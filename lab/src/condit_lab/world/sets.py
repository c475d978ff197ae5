"""The icon sets of the world and their styles, read from `tables/sets.tsv` and `tables/styles.tsv`."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from condit_lab.icons.packages import Package

TABLES = Path(__file__).parent / "tables"
Kind = Literal["line", "solid", "duotone", "color", "gradient", "sketch", "painted", "pixel", "3d"]

_SIZES = ("24", "28", "32", "20", "48", "16", "12", "10")  # of one drawing, best first
_SIZED = re.compile(rf"-({'|'.join(_SIZES)})$")


@dataclass(frozen=True)
class PackageSet:
    """One npm package of icons. licence is an SPDX name; sets of one family show the same shapes."""

    key: str
    package: Package
    licence: str
    author: str
    url: str
    family: str


@dataclass(frozen=True)
class Look:
    """One drawing style. An icon of `icon_set` belongs to it when its name carries `affix`: "-bold" at the end,
    "twotone-" at the start, nothing at all for "". descriptions are (English, Chinese)."""

    key: str
    icon_set: str
    affix: str
    kind: Kind
    name_en: str
    name_zh: str
    description_en: str
    description_zh: str


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of one of the package's tables."""
    with open(TABLES / name, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))


@functools.cache
def icon_sets() -> dict[str, PackageSet]:
    """Every set by key, in the order of the table."""
    return {
        row["set"]: PackageSet(
            row["set"],
            Package(row["package"], row["version"], row["sha256"]),
            row["licence"],
            row["author"],
            row["url"],
            row["family"],
        )
        for row in read_table("sets.tsv")
    }


@functools.cache
def looks() -> tuple[Look, ...]:
    """Every row of the table of styles; a style drawn by two sets (lucide) has two rows."""
    return tuple(
        Look(
            row["key"],
            row["set"],
            row["affix"],
            row["kind"],  # pyright: ignore[reportArgumentType]  # the test of the table checks the kinds
            row["name_en"],
            row["name_zh"],
            row["descriptions_en"],
            row["descriptions_zh"],
        )
        for row in read_table("styles.tsv")
    )


# Affixes of a set that make another drawing of it and belong to no style of the table.
_OTHER_AFFIXES = {
    "clarity": ("-alerted", "-badged", "-outline-alerted", "-outline-badged", "-solid-alerted", "-solid-badged"),
    "fluent": ("-light", "-color"),
    "healthicons": ("-24px", "-outline-24px"),
    "heroicons": ("-16-solid", "-20-solid"),
    "iconamoon": ("-light",),
    "ic": ("outline-", "round-", "sharp-"),
    "la": ("-solid",),
    "majesticons": ("-solid",),
    "material-symbols": ("-outline",),
    "material-symbols-light": ("-rounded", "-sharp", "-outline", "-outline-sharp"),
    "pepicons-pencil": ("-circle", "-circle-filled", "-circle-off", "-off"),
    "pepicons-pop": ("-circle", "-circle-filled", "-circle-off", "-off"),
    "pepicons-print": ("-circle", "-circle-filled", "-circle-off", "-off"),
    "solar": ("-outline",),
    "stash": ("-light",),
    "akar-icons": ("-fill",),
    "carbon": ("-filled",),
    "gravity-ui": ("-fill",),
    "qlementine-icons": ("-12", "-24", "-32"),
}
_UNSUFFIXED = {"ic", "qlementine-icons"}  # a bare name is no drawing of a style


def split_affix(icon_set: str, name: str) -> tuple[str, Look] | None:
    """("bell", its style) of "bell-bold"; None where the variant belongs to no style. The longest affix wins."""
    own, affixes = _affixes(icon_set)
    for affix in affixes:
        if affix.endswith("-") and name.startswith(affix):
            return _with_look(name.removeprefix(affix), own.get(affix))
        if affix.startswith("-") and name.endswith(affix):
            return _with_look(name.removesuffix(affix), own.get(affix))
    return _with_look(name, own.get("") if icon_set not in _UNSUFFIXED else None)


def split_size(icon_set: str, stem: str) -> tuple[str, int]:
    """("bell", 0) of fluent's "bell-24": the name without its size and the size's rank, 0 = best."""
    size = _SIZED.search(stem) if icon_set in ("fluent", "fluent-color") else None
    return (stem[: size.start()], _SIZES.index(size[1])) if size else (stem, len(_SIZES))


def drawings_of(icon_set: str, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(style, stem, icon name) of a set's icons, one size of each, sorted."""
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for name in names:
        split = split_affix(icon_set, name)
        if split is None:
            continue
        stem, rank = split_size(icon_set, split[0])
        key = (split[1].key, stem)
        best[key] = min(best.get(key, (99, "")), (rank, name))
    return sorted((style, stem, name) for (style, stem), (_, name) in best.items())


@functools.cache
def _affixes(icon_set: str) -> tuple[dict[str, Look], tuple[str, ...]]:
    """(the set's styles by affix, every affix, the longest first)."""
    own = {look.affix: look for look in looks() if look.icon_set == icon_set}
    return own, tuple(sorted({*own, *_OTHER_AFFIXES.get(icon_set, ())}, key=len, reverse=True))


def _with_look(stem: str, look: Look | None) -> tuple[str, Look] | None:
    return (stem, look) if look is not None and stem else None
