"""Subjects200K (OminiControl, arXiv:2411.15098, section 3.3): two pictures of one subject side by side in one image."""

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
# The official crops. The right one begins at the seam, so it is not centred in its half.
LEFT = PADDING, PADDING, PADDING + SIDE, PADDING + SIDE
RIGHT = SIZE[0] // 2, PADDING, SIZE[0] // 2 + SIDE, PADDING + SIDE
CENTRED = SIZE[0] // 2 + PADDING, PADDING, SIZE[0] // 2 + PADDING + SIDE, PADDING + SIDE
QUALITIES = ("compositeStructure", "objectConsistency", "imageQuality")
LEAST = 5


def good(assessment: Mapping[str, Any] | None) -> bool:
    """The official filter: all three marks are at least 5; a mark that is missing counts 0."""
    return bool(assessment) and all((assessment.get(name) or 0) >= LEAST for name in QUALITIES)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Subjects200K:
    """Pairs of the data set's rows: 2 k is row k with the left picture as target, 2 k + 1 with the right one; the other
    is the reference "subject". `kept` are the numbers of the rows that passed the filter."""

    rows: Any  # a datasets.Dataset, or any sequence of rows
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
            raise ValueError(f"row {self.kept[index // 2]}: a picture of {SIZE} is expected; found {image.size}.")
        both: list[Image.Image] = [image.crop(LEFT), image.crop(CENTRED if self.centred else RIGHT)]
        side = index % 2
        return Pair(both[side], row["description"][f"description_{side}"], {"subject": (both[1 - side],)})


def subjects200k(rows: Any, *, centred: bool = False) -> Subjects200K:
    """The pairs of rows as `datasets.load_dataset("Yuanshi/Subjects200K", split="train")` gives them.

    centred: the right picture is cropped in the middle of its half, as the paper says, not as its code does.
    """
    # Of a datasets.Dataset the column alone: its rows would decode 200,000 pictures.
    marks: Sequence = (
        rows["quality_assessment"] if hasattr(rows, "column_names") else [row.get("quality_assessment") for row in rows]
    )
    return Subjects200K(rows, tuple(i for i, mark in enumerate(marks) if good(mark)), centred)


def open_subjects200k(source: str | Path = REPOSITORY, *, centred: bool = False) -> Subjects200K:
    """The data set from a folder of its parquet files, or by name. Needs `datasets` (pip install 'condit[pairs]')."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Subjects200K is read by `datasets`: pip install 'condit[pairs]'") from error
    folder = Path(source)
    files = sorted(str(file) for file in folder.rglob("*.parquet")) if folder.is_dir() else []
    if folder.is_dir() and not files:
        raise ValueError(f"{folder} holds no parquet file of {REPOSITORY}.")
    if files:
        return subjects200k(datasets.load_dataset("parquet", data_files=files, split="train"), centred=centred)
    return subjects200k(datasets.load_dataset(str(source), split="train"), centred=centred)
