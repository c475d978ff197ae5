"""The emoji sets of the first world: their rows, splits and drawings, unchanged. All that this package needs of
`condit_lab.icons` beyond packages and splits is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from condit_lab.icons.build import emoji_index, rasterise
from condit_lab.icons.names import slug
from condit_lab.icons.packages import EMOJIBASE, Package, drawings, package_of
from condit_lab.icons.styles import STYLES
from condit_lab.icons.world import TRAIN_LICENCES, Icon

__all__ = ["EMOJI_PACKAGES", "EmojiConcept", "emoji_drawings", "emoji_rows", "rasterise", "slug"]

# Names are resolved over all sets, the share-alike ones too, so that every split stays what it was.
EMOJI_PACKAGES: tuple[Package, ...] = (*(package_of(style) for style in STYLES.values()), EMOJIBASE)

# Emojibase leaves these without a Chinese character.
_CHINESE = {"OK hand": "OK手势", "dvd": "DVD光盘", "dna": "DNA双螺旋"}


@dataclass(frozen=True)
class EmojiConcept:
    """A concept of emojibase: its key is `base`, code points without tone and gender."""

    key: str
    label_en: str
    label_zh: str
    tags_en: tuple[str, ...]
    tags_zh: tuple[str, ...]
    group: str


def emoji_rows(files: dict[str, Path]) -> tuple[list[Icon], dict[str, EmojiConcept]]:
    """(rows of the sets without share-alike, concepts by hexcode) from package name -> tarball."""
    tarballs = {key: files[style.package] for key, style in STYLES.items()}
    icons, table = emoji_index(tarballs, files[EMOJIBASE.name])
    concepts = {
        key: EmojiConcept(
            entry["base"],
            entry["label_en"],
            _CHINESE.get(entry["label_en"]) or entry["label_zh"],
            tuple(entry["tags_en"]),
            tuple(entry["tags_zh"]),
            entry["group"],
        )
        for key, entry in table.items()
    }
    return [icon for icon in icons if icon.licence in TRAIN_LICENCES], concepts


def emoji_drawings(files: dict[str, Path], style: str, names: Iterable[str]) -> Iterator[tuple[str, str | bytes]]:
    """(icon name, SVG document or WebP bytes) of one emoji set."""
    return drawings(style, files[STYLES[style].package], names)
