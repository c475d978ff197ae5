"""Subjects200K (OminiControl, arXiv:2411.15098, section 3.3): images that show one subject twice, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from condit.data.images import load_image
from condit.data.pairs import Pair

REPOSITORY = "Yuanshi/Subjects200K"
SIZE, SIDE, PADDING = (1056, 528), 512, 8
# The official crops. The right one begins at the seam, so it is not at the centre of its half.
LEFT = PADDING, PADDING, PADDING + SIDE, PADDING + SIDE
RIGHT = SIZE[0] // 2, PADDING, SIZE[0] // 2 + SIDE, PADDING + SIDE
CENTRED = SIZE[0] // 2 + PADDING, PADDING, SIZE[0] // 2 + PADDING + SIDE, PADDING + SIDE
QUALITIES = ("compositeStructure", "objectConsistency", "imageQuality")
MIN_QUALITY = 5


def good(assessment: Mapping[str, int | None] | None) -> bool:
    """The official filter: all three marks are at least 5; a missing mark counts as 0."""
    marks = assessment or {}
    return all((marks.get(name) or 0) >= MIN_QUALITY for name in QUALITIES)


@dataclass(frozen=True)
class Subjects200K:
    """Pairs of the rows: pair 2 k has the left image of the k-th kept row as target, pair 2 k + 1 the right one; the
    other image is the reference "subject". `kept` are the numbers of the rows that passed the filter."""

    rows: Sequence[Mapping[str, Any]]  # or a datasets.Dataset
    kept: tuple[int, ...]
    centred: bool = False

    def __len__(self) -> int:
        return 2 * len(self.kept)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = self.rows[self.kept[index // 2]]
        image = row["image"]
        image = load_image(image["bytes"] if isinstance(image, Mapping) else image)
        if image.size != SIZE:
            raise ValueError(f"row {self.kept[index // 2]}: expected an image of {SIZE}; found {image.size}.")
        both: list[Image.Image] = [image.crop(LEFT), image.crop(CENTRED if self.centred else RIGHT)]
        side = index % 2
        return Pair(both[side], row["description"][f"description_{side}"], {"subject": (both[1 - side],)})


def subjects200k(rows: Any, *, centred: bool = False) -> Subjects200K:
    """The pairs of rows as `datasets.load_dataset("Yuanshi/Subjects200K", split="train")` returns them.

    centred: crop the right image at the centre of its half, as the paper describes, not as the official code does.
    """
    # From a datasets.Dataset only this column is read, as reading rows would decode 200,000 images.
    marks: Sequence = (
        rows["quality_assessment"] if hasattr(rows, "column_names") else [row.get("quality_assessment") for row in rows]
    )
    return Subjects200K(rows, tuple(i for i, mark in enumerate(marks) if good(mark)), centred)


def open_subjects200k(source: str | Path = REPOSITORY, *, centred: bool = False) -> Subjects200K:
    """The data set from a folder of its parquet files, or by name. ImportError without `datasets`, ValueError for a
    folder without parquet files."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Subjects200K needs `datasets`: pip install 'condit[pairs]'") from error
    folder = Path(source)
    files = sorted(str(file) for file in folder.rglob("*.parquet")) if folder.is_dir() else []
    if folder.is_dir() and not files:
        raise ValueError(f"{folder} has no parquet file of {REPOSITORY}.")
    if files:
        return subjects200k(datasets.load_dataset("parquet", data_files=files, split="train"), centred=centred)
    return subjects200k(datasets.load_dataset(str(source), split="train"), centred=centred)
