"""A built world on disk and how it is opened.

| file | content |
|---|---|
| `images.u8` | (n, 128, 128, 4) uint8, straight alpha, zero where transparent; memory-mapped |
| `index.tsv` | one row an image, in the order of `images.u8` |
| `concepts.tsv`, `styles.tsv` | one row an id |
| `captions.tsv` | three English and three Chinese captions a row |
| `ATTRIBUTION.md` | authors, sources, licences |
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from condit_lab.icons.world import SIZE

T = TypeVar("T")

IMAGES, INDEX, CONCEPTS, STYLES, CAPTIONS = "images.u8", "index.tsv", "concepts.tsv", "styles.tsv", "captions.tsv"


@dataclass(frozen=True)
class DrawingRow:
    """One image. name = the icon's name in its set; label = what it shows, details included ("cart with a plus sign");
    detail is 1 where the label says more than the concept; colours are measured, the largest area first."""

    style: str
    name: str
    concept: str
    label_en: str
    label_zh: str
    detail: int
    group: str
    split: str
    licence: str
    colours: str
    translucent: int
    shaded: int


@dataclass(frozen=True)
class Concept:
    """What is drawn. key = code points of an emoji, or a phrase; held = never trained in any style."""

    key: str
    label_en: str
    label_zh: str
    tags_en: str
    tags_zh: str
    group: str
    held: int
    images: int
    styles: int


@dataclass(frozen=True)
class StyleRow:
    """How it is drawn."""

    key: str
    family: str
    kind: str
    licence: str
    name_en: str
    name_zh: str
    description_en: str
    description_zh: str
    held: int
    images: int


@dataclass(frozen=True)
class World:
    """A built world. Arrays are parallel: image[i] shows concepts[concept_id[i]] in styles[style_id[i]]."""

    image: NDArray[np.uint8]
    rows: list[DrawingRow]
    concepts: list[Concept]
    styles: list[StyleRow]
    concept_id: NDArray[np.int32]
    style_id: NDArray[np.int32]
    split: NDArray[np.str_]
    captions: list[tuple[str, ...]]

    @classmethod
    def open(cls, path: str | Path) -> World:
        """Open a folder written by `condit_lab.world`; images stay on disk until they are read."""
        path = Path(path)
        if not (path / INDEX).is_file():
            raise ValueError(f"There is no icon world at {path}. Build one: python -m condit_lab.world --out DIR.")
        rows = _typed(DrawingRow, path / INDEX)
        concepts = _typed(Concept, path / CONCEPTS)
        styles = _typed(StyleRow, path / STYLES)
        captions = [tuple(row.values()) for row in _read(path / CAPTIONS)]
        expected = len(rows) * SIZE * SIZE * 4
        size = (path / IMAGES).stat().st_size
        if size != expected or len(captions) != len(rows):
            raise ValueError(
                f"{path}: {IMAGES} has {size} bytes and {CAPTIONS} {len(captions)} rows, expected {expected} and "
                f"{len(rows)} for {len(rows)} rows of {INDEX}. Build the world again"
            )
        image = np.memmap(path / IMAGES, np.uint8, "r", shape=(len(rows), SIZE, SIZE, 4))
        concept_at = {concept.key: index for index, concept in enumerate(concepts)}
        style_at = {style.key: index for index, style in enumerate(styles)}
        return cls(
            image,
            rows,
            concepts,
            styles,
            np.array([concept_at[row.concept] for row in rows], np.int32),
            np.array([style_at[row.style] for row in rows], np.int32),
            np.array([row.split for row in rows]),
            captions,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label_en(self) -> list[str]:
        """What each image shows, in English."""
        return [row.label_en for row in self.rows]

    @property
    def label_zh(self) -> list[str]:
        """What each image shows, in Chinese."""
        return [row.label_zh for row in self.rows]

    def where(
        self,
        *,
        splits: Collection[str] | None = None,
        kinds: Collection[str] | None = None,
        groups: Collection[str] | None = None,
        details: bool = True,
    ) -> NDArray[np.int64]:
        """Indices of the images that pass every filter; None keeps all, details=False leaves out "with a plus sign"."""
        keep = np.ones(len(self), bool)
        if splits is not None:
            keep &= np.isin(self.split, list(splits))
        if kinds is not None:
            of_kind = np.array([style.kind in kinds for style in self.styles])
            keep &= of_kind[self.style_id]
        if groups is not None:
            keep &= np.array([row.group in groups for row in self.rows])
        if not details:
            keep &= np.array([row.detail == 0 for row in self.rows])
        return np.flatnonzero(keep)


def write_rows(file: Path, names: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """A table as TSV; a cell with a tab or a line break is a bug of the builder."""
    with open(file, "w", encoding="utf-8", newline="") as handle:
        handle.write("\t".join(names) + "\n")
        for row in rows:
            cells = [str(cell) for cell in row]
            if any("\t" in cell or "\n" in cell for cell in cells):
                raise ValueError(f"{file.name}: a cell must have no tab and no line break; found {cells}.")
            handle.write("\t".join(cells) + "\n")


def field_names(kind: type[DrawingRow] | type[Concept] | type[StyleRow]) -> list[str]:
    """The columns of a table."""
    return [field.name for field in fields(kind)]


def _read(file: Path) -> Iterator[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as handle:
        yield from csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)


def _typed(kind: type[T], file: Path) -> list[T]:
    """The lines of a table as objects of its dataclass, whose fields name the columns; numbers become int."""
    types = get_type_hints(kind)
    return [kind(**{name: types[name](cells[name]) for name in types}) for cells in _read(file)]
