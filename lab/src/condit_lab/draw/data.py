"""Drawings in memory for training: compressed RGBA pictures with style, concept and captions, in files that travel.

A pack is a folder with `rows.jsonl.xz` and `pictures-NNN.bin` of less than 60 MB each:

    python -m condit_lab.draw.data WORLD PACK      # of a world made by `python -m condit_lab.world`
    python -m condit_lab.draw.data ICONS PACK      # of an icon world made by `condit data icons`
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from condit_lab.icons.captions import caption, plain_caption
from condit_lab.icons.styles import STYLES as EMOJI_STYLES
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES, IconWorld

ROWS = "rows.jsonl.xz"
PART_BYTES = 58 << 20
LEFT_OUT = ("people-body", "symbols", "flags")  # groups of the emoji sets that the embedded models do not know


@dataclass(frozen=True)
class Drawing:
    """style and concept as keys; split "train" or "held-out"; core: of the coloured sets that half of every batch
    comes from; captions: the first is the plain one, on which figures are measured."""

    style: str
    concept: str
    split: str
    core: bool
    captions: tuple[str, ...]


class ImageStore(Protocol):
    """Straight RGBA pictures of one size."""

    def __len__(self) -> int: ...

    def pixels(self, i: int) -> NDArray[np.uint8]:
        """(H, W, 4)."""
        ...

    def file(self, i: int) -> bytes:
        """As a compressed file (WebP, lossless)."""
        ...

    def select(self, indices: Sequence[int]) -> ImageStore: ...


@dataclass(frozen=True)
class Packed:
    """Compressed files in memory."""

    files: list[bytes]

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, i: int) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(self.files[i]), formats=("WEBP",)) as image:
            return np.asarray(image.convert("RGBA"))

    def file(self, i: int) -> bytes:
        return self.files[i]

    def select(self, indices: Sequence[int]) -> Packed:
        return Packed([self.files[i] for i in indices])


@dataclass(frozen=True)
class Mapped:
    """Rows of an array on disk."""

    array: NDArray[np.uint8]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, i: int) -> NDArray[np.uint8]:
        return np.asarray(self.array[self.rows[i]])

    def file(self, i: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(self.pixels(i)).save(out, "WEBP", lossless=True, quality=50, method=1)
        return out.getvalue()

    def select(self, indices: Sequence[int]) -> Mapped:
        return Mapped(self.array, self.rows[list(indices)])


@dataclass(frozen=True)
class Drawings:
    """Rows and their pictures."""

    rows: list[Drawing]
    pictures: ImageStore

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Drawings:
        return Drawings([self.rows[i] for i in indices], self.pictures.select(indices))

    def split(self, name: str) -> Drawings:
        return self.select([i for i, row in enumerate(self.rows) if row.split == name])

    def rgba(self, indices: Sequence[int], workers: int = 1) -> Tensor:
        """Straight uint8 (B, 4, H, W)."""
        with ThreadPoolExecutor(workers) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self.pictures.pixels, indices)))).movedim(-1, 1)

    def write(self, folder: Path) -> None:
        """As a pack."""
        folder.mkdir(parents=True, exist_ok=True)
        part, content = 0, bytearray()
        with lzma.open(folder / ROWS, "wt", encoding="utf-8", preset=3) as rows:
            for i, row in enumerate(self.rows):
                picture = self.pictures.file(i)
                if len(content) + len(picture) > PART_BYTES:
                    (folder / f"pictures-{part:03d}.bin").write_bytes(content)
                    part, content = part + 1, bytearray()
                fields = {**asdict(row), "part": part, "offset": len(content), "size": len(picture)}
                rows.write(json.dumps(fields, ensure_ascii=False) + "\n")
                content += picture
        (folder / f"pictures-{part:03d}.bin").write_bytes(content)

    @classmethod
    def open(cls, folder: Path) -> Drawings:
        """A pack, or the folder of a world (`condit_lab.world`) as it is."""
        if not (folder / ROWS).is_file():
            return from_world(folder)
        parts = [path.read_bytes() for path in sorted(folder.glob("pictures-*.bin"))]
        rows, files = [], []
        with lzma.open(folder / ROWS, "rt", encoding="utf-8") as lines:
            for line in lines:
                fields = json.loads(line)
                part, offset, size = (fields.pop(name) for name in ("part", "offset", "size"))
                rows.append(Drawing(**{**fields, "captions": tuple(fields["captions"])}))
                files.append(parts[part][offset : offset + size])
        return cls(rows, Packed(files))


class Mixture:
    """Which drawings a batch holds: `core_share` of it from the coloured core, the rest from all styles, from each as
    often as the root of its size: evenly, a style of 20 icons would show each of them 80 times as often as one of
    1,600."""

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

    def weights(self) -> Tensor:
        """How often `draw` gives each row, times the number of rows, (rows,) float32."""
        total = len(self.by_style)
        share = self.counts.double().sqrt() / self.counts.double().sqrt().sum() / self.counts
        weights = torch.zeros(total, dtype=torch.float64)
        weights[self.by_style] = (1 - self.core_share) * share.repeat_interleave(self.counts) * total
        weights[self.core] += self.core_share * total / max(1, len(self.core))
        return weights.float()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Row numbers (n,); those of the core come first."""
        n_core = round(n * self.core_share)
        core = self.core[torch.randint(max(1, len(self.core)), (n_core,), generator=generator)]
        style = torch.multinomial(self.counts.double().sqrt(), n - n_core, replacement=True, generator=generator)
        place = (torch.rand(n - n_core, generator=generator, dtype=torch.float64) * self.counts[style]).long()
        return torch.cat([core, self.by_style[self.begins[style] + place]])


def from_world(folder: Path) -> Drawings:
    """A world of `python -m condit_lab.world`: training drawings and held-out combinations."""
    if not (folder / "index.tsv").is_file():
        raise ValueError(
            f"{folder} holds no pack of drawings and no world. Build one: python -m condit_lab.world --out DIR."
        )
    from condit_lab.world import World

    world = World.open(folder)
    splits = {"train": "train", "combo": "held-out"}
    chosen = [i for i, row in enumerate(world.rows) if row.split in splits and row.group not in LEFT_OUT]
    rows = []
    for i in chosen:
        row, style = world.rows[i], world.styles[world.style_id[i]]
        plain = (f"{row.label_en}, {style.name_en} style", f"{row.label_zh}，{style.name_zh}风格")
        captions = tuple(dict.fromkeys([*plain, *world.captions[i]]))
        rows.append(Drawing(row.style, row.concept, splits[row.split], row.style in EMOJI_STYLES, captions))
    return Drawings(rows, Mapped(world.image, np.array(chosen)))


def from_icon_world(path: str, ui: str | None = None, captions: int = 10) -> Drawings:
    """The icon world of `condit data icons`: training icons and held-out combinations of the sets that may be trained
    on; `ui`: that of interface icons, which is not of the core."""
    rows, files = [], []
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
                files.append(world.read(icon))
    return Drawings(rows, Packed(files))


def all_captions(rows: Iterable[Drawing]) -> Iterable[str]:
    for row in rows:
        yield from row.captions


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a world for training elsewhere.")
    parser.add_argument("world", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--ui", help="beside an icon world: that of interface icons")
    chosen = parser.parse_args()
    older = any(chosen.world.glob("*.tar"))
    drawings = from_icon_world(str(chosen.world), chosen.ui) if older else from_world(chosen.world)
    drawings.write(chosen.pack)


if __name__ == "__main__":
    main()
