"""Drawings in memory for training: compressed RGBA pictures with style, concept and captions, in files that travel.

A pack is a folder with `rows.jsonl.xz` and `pictures-NNN.bin` of less than 60 MB each.
"""

from __future__ import annotations

import io
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condit_lab.icons.captions import caption, plain_caption
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES, IconWorld

PART_BYTES = 58 << 20


@dataclass(frozen=True)
class Drawing:
    """style and concept as keys; split "train" or "held-out"; core: of the coloured sets that half of every batch
    comes from; captions: the first is the plain one, on which figures are measured."""

    style: str
    concept: str
    split: str
    core: bool
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Drawings:
    """Rows and their pictures as compressed files (WebP or PNG, straight RGBA, one size)."""

    rows: list[Drawing]
    pictures: list[bytes]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Drawings:
        return Drawings([self.rows[i] for i in indices], [self.pictures[i] for i in indices])

    def split(self, name: str) -> Drawings:
        return self.select([i for i, row in enumerate(self.rows) if row.split == name])

    def rgba(self, indices: Sequence[int], workers: int = 1) -> Tensor:
        """Straight uint8 (B, 4, H, W)."""
        with ThreadPoolExecutor(workers) as pool:
            decoded = list(pool.map(lambda i: decode(self.pictures[i]), indices))
        return torch.from_numpy(np.stack(decoded)).movedim(-1, 1)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part, used, handle = -1, PART_BYTES, None
        with lzma.open(folder / "rows.jsonl.xz", "wt", encoding="utf-8", preset=3) as rows:
            for row, picture in zip(self.rows, self.pictures, strict=True):
                if used + len(picture) > PART_BYTES:
                    if handle is not None:
                        handle.close()
                    part, used = part + 1, 0
                    handle = open(folder / f"pictures-{part:03d}.bin", "wb")  # noqa: SIM115 - closed below
                assert handle is not None
                handle.write(picture)
                fields = {**asdict(row), "part": part, "offset": used, "size": len(picture)}
                rows.write(json.dumps(fields, ensure_ascii=False) + "\n")
                used += len(picture)
        if handle is not None:
            handle.close()

    @classmethod
    def open(cls, folder: Path) -> Drawings:
        if not (folder / "rows.jsonl.xz").is_file():
            raise ValueError(f"No pack of drawings at {folder}. Make one: python -m condit_lab.draw.data --help")
        parts = [path.read_bytes() for path in sorted(folder.glob("pictures-*.bin"))]
        rows, pictures = [], []
        with lzma.open(folder / "rows.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                fields = json.loads(line)
                part, offset, size = (fields.pop(name) for name in ("part", "offset", "size"))
                rows.append(Drawing(**{**fields, "captions": tuple(fields["captions"])}))
                pictures.append(parts[part][offset : offset + size])
        return cls(rows, pictures)


def decode(picture: bytes) -> np.ndarray:
    """(H, W, 4) uint8."""
    with Image.open(io.BytesIO(picture), formats=("WEBP", "PNG")) as image:
        return np.asarray(image.convert("RGBA"))


class Mixture:
    """Which drawings a batch holds: `core_share` of it from the coloured core, the rest by style, evenly."""

    def __init__(self, rows: Sequence[Drawing], core_share: float):
        by_style: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            by_style[row.style].append(i)
        groups = [by_style[style] for style in sorted(by_style)]
        self.by_style = torch.tensor([i for group in groups for i in group])
        self.counts = torch.tensor([len(group) for group in groups])
        self.begins = self.counts.cumsum(0) - self.counts
        self.core = torch.tensor([i for i, row in enumerate(rows) if row.core])
        self.core_share = core_share if len(self.core) else 0.0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Row numbers (n,); those of the core come first."""
        n_core = round(n * self.core_share)
        core = self.core[torch.randint(max(1, len(self.core)), (n_core,), generator=generator)]
        style = torch.randint(len(self.counts), (n - n_core,), generator=generator)
        place = (torch.rand(n - n_core, generator=generator, dtype=torch.float64) * self.counts[style]).long()
        return torch.cat([core, self.by_style[self.begins[style] + place]])


def from_icon_world(path: str, ui: str | None = None, captions: int = 10) -> Drawings:
    """The icon world of `condit data icons`: training icons and held-out combinations of the sets that may be trained
    on; `ui`: that of interface icons, which is not of the core."""
    rows, pictures = [], []
    worlds = [(path, True, {"groups": GROUPS, "licences": TRAIN_LICENCES})]
    if ui is not None:
        worlds.append((ui, False, {}))
    for folder, core, chosen in worlds:
        for split, name in (("train", "train"), ("combo", "held-out")):
            try:
                world = IconWorld.open(folder, splits=(split,), **chosen)
            except ValueError:
                if core:
                    raise
                continue  # a world of interface icons may hold nothing out
            for icon in world.icons:
                rng = random.Random(f"{icon.style}/{icon.hex}")
                drawn = [
                    caption(icon, world.concepts, rng, p_empty=0.0, p_no_style=0.15, p_tags=0.2)
                    for _ in range(captions - 2)
                ]
                plain = [plain_caption(icon), plain_caption(icon, "zh", world.concepts)]
                rows.append(Drawing(icon.style, icon.base, name, core, tuple(dict.fromkeys([*plain, *drawn]))))
                pictures.append(world.read(icon))
    return Drawings(rows, pictures)


def all_captions(rows: Iterable[Drawing]) -> Iterable[str]:
    for row in rows:
        yield from row.captions
