"""The icon world: one concept drawn in many vendors' styles, with true (content, style) labels.

A world is a folder (or one packed file) holding `index.tsv`, `concepts.json`, `ATTRIBUTION.md` and RGBA WebP rasters
`<style>/<hex>.webp` of 128 px. `icons/build.py` builds it from published icon sets; this file reads it.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from condit.data.files import hash_fraction
from condit.data.icon_sample import sample_path
from condit_lab.icons.captions import caption, plain_caption
from condit_lab.icons.styles import STYLES, UI_STYLES, Style, family, style_of

__all__ = [
    "GROUPS",
    "OBJECT_GROUPS",
    "SIZE",
    "STYLES",
    "TRAIN_LICENCES",
    "UI_STYLES",
    "Icon",
    "IconWorld",
    "Style",
    "base_of",
    "caption",
    "family",
    "on_white",
    "plain_caption",
    "sample_path",
    "split_of",
    "style_of",
    "hash_fraction",
]

SIZE = 128
OBJECT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
# What the embedded models know: no people, flags or symbols.
GROUPS = (*OBJECT_GROUPS, "smileys-emotion")
# Share-alike sets stay out of training: whether trained weights are adapted material is unsettled.
TRAIN_LICENCES = ("Apache-2.0", "MIT", "OFL-1.1", "CC-BY-4.0")
HELD_OUT_STYLE = "streamline-emojis"
HELD_OUT_SHARE = 0.08

_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_VARIATION = {"FE0F", "FE0E"}
_GENDER_SIGNS = {"2640", "2642"}
_MAN_WOMAN, _PERSON = {"1F468", "1F469"}, "1F9D1"
_NOT_ONE_PERSON = {"1F466", "1F467", "1F9D2", "2764"}  # children: a family; a heart: a couple
_MAX_MEMBER = 4 << 20  # bytes; an honest 128 px raster stays below 100 kB, the index below 2 MB


@dataclass(frozen=True)
class Icon:
    """One picture. hex = its concept's code points (or the name, in the UI world), base = hex without tone and gender,
    split = train | concept | combo | style | style+concept, ok = usable, licence = SPDX name."""

    style: str
    icon: str
    hex: str
    base: str
    label: str
    group: str
    split: str
    ok: bool
    licence: str

    @property
    def member(self) -> str:
        """The raster's name inside its shard."""
        return f"{self.style}/{self.hex}.webp"


def concept_names(icons: Iterable[Icon]) -> dict[str, str]:
    """base -> label of every concept. An icon of the concept itself names it better than one of its variants ("woman
    astronaut")."""
    return {icon.base: icon.label for icon in sorted(icons, key=lambda icon: icon.hex == icon.base)}


def key_of(hexcode: str) -> str:
    """Code points as a key: upper case, without variation selectors. '2764-fe0f' -> '2764'."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in _VARIATION)


def base_of(hexcode: str) -> str:
    """The concept without skin tone and gender: '1F469-200D-1F680' (woman astronaut) -> '1F9D1-200D-1F680'.
    Splits go by it, never by hexcode, so that no drawing leaks through its sister."""
    parts = [part for part in key_of(hexcode).split("-") if part not in _TONES]
    base: list[str] = []
    for part in parts:
        if part in _GENDER_SIGNS and base and base[-1] == "200D":
            base.pop()
        else:
            base.append(part)
    adults = sum(part in _MAN_WOMAN or part == _PERSON for part in base)
    if len(base) > 1 and base[0] in _MAN_WOMAN and adults == 1 and not _NOT_ONE_PERSON.intersection(base):
        base[0] = _PERSON
    return "-".join(base)


def split_of(base: str, style: str, families: Collection[str]) -> str:
    """The split of one (concept, style). families = every vendor family that draws this base.

    Held out are one whole style, 8 % of the concepts, and 8 % of the (concept, family) cells as long as three other
    families still draw the concept."""
    held_concept = hash_fraction(f"concept/{base}") < HELD_OUT_SHARE
    if style == HELD_OUT_STYLE:
        return "style+concept" if held_concept else "style"
    if held_concept:
        return "concept"
    own = family(style)
    others = set(families) - {own, family(HELD_OUT_STYLE)}
    return "combo" if hash_fraction(f"combo/{base}/{own}") < HELD_OUT_SHARE and len(others) >= 3 else "train"


def read_index(text: str) -> list[Icon]:
    """`index.tsv` as icons; raises where a column is missing."""
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = [field.name for field in fields(Icon)]
    if missing := [name for name in names if name not in (rows.fieldnames or [])]:
        raise ValueError(f"index.tsv has no column {missing[0]!r}; found {rows.fieldnames}. Build the world again.")
    return [Icon(*(row[name] for name in names[:7]), ok=row["ok"] == "1", licence=row["licence"]) for row in rows]


def write_index(icons: Iterable[Icon]) -> str:
    """Icons as the text of `index.tsv`."""
    lines = ["\t".join(field.name for field in fields(Icon))]
    for icon in icons:
        lines.append("\t".join(str(int(cell)) if isinstance(cell, bool) else cell for cell in astuple(icon)))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ByteSpan:
    """Where the bytes of a raster are: a span of a file."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        # Opened for each read: workers of a DataLoader would share the position of one handle.
        with open(self.file, "rb") as handle:
            handle.seek(self.offset)
            return handle.read(self.size)


@dataclass(frozen=True)
class IconWorld:
    """Icons that can be read: `icons[i]` is drawn by `rgba(i)`; `concepts[icon.hex]` has labels and tags
    (`base, label_en, label_zh, tags_en, tags_zh, group`)."""

    icons: list[Icon]
    concepts: dict[str, dict[str, Any]]
    places: dict[str, ByteSpan]
    attribution: str = ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        styles: Collection[str] | None = None,
        groups: Collection[str] | None = None,
        splits: Collection[str] | None = None,
        licences: Collection[str] | None = None,
    ) -> IconWorld:
        """Open a built folder or a packed file; each filter keeps what it names, None keeps all. Unusable icons and
        icons whose shard is absent (an optional licence class) are left out."""
        path = Path(path)
        if not path.exists():
            raise ValueError(f"There is no icon world at {path}. Build one: condit data icons --out DIR.")
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        places: dict[str, ByteSpan] = {}
        for shard in shards:
            places.update(_places(shard))
        texts = {}
        for name in ("index.tsv", "concepts.json", "ATTRIBUTION.md"):
            if path.is_dir() and (path / name).is_file():
                texts[name] = (path / name).read_text(encoding="utf-8")
            elif name in places:
                texts[name] = places[name].read().decode("utf-8")
        if missing := [name for name in ("index.tsv", "concepts.json") if name not in texts]:
            raise ValueError(
                f"{path} is not an icon world: {missing[0]} is missing. Build one: condit data icons --out DIR."
            )
        rows = read_index(texts["index.tsv"])
        for column, wanted in (("style", styles), ("group", groups), ("split", splits), ("licence", licences)):
            if wanted is not None:
                _check_known(column, wanted, {getattr(icon, column) for icon in rows})
                rows = [icon for icon in rows if getattr(icon, column) in wanted]
        icons = [icon for icon in rows if icon.ok and icon.member in places]
        return cls(icons, json.loads(texts["concepts.json"]), places, texts.get("ATTRIBUTION.md", ""))

    def __len__(self) -> int:
        return len(self.icons)

    def rgba(self, index: int) -> NDArray[np.uint8]:
        """The raster with straight alpha, (128, 128, 4) uint8."""
        return decode(self.read(self.icons[index]), self.icons[index].member)

    def read(self, icon: Icon) -> bytes:
        """The icon's WebP file."""
        return self.places[icon.member].read()

    def rgba_all(self) -> NDArray[np.uint8]:
        """Every raster, (N, 128, 128, 4) uint8: 64 KiB an icon."""
        out = np.empty((len(self.icons), SIZE, SIZE, 4), np.uint8)
        for index in range(len(self.icons)):
            out[index] = self.rgba(index)
        return out


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """WebP bytes to (128, 128, 4) uint8; raises where the file is something else."""
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        if image.size != (SIZE, SIZE):
            raise ValueError(
                f"{name} is {image.size[0]}x{image.size[1]}; the images of an icon world must be {SIZE}x{SIZE}."
            )
        return np.asarray(image.convert("RGBA"))


def on_white(rgba: NDArray[np.uint8], fit: Literal["native", "box"] = "native") -> NDArray[np.uint8]:
    """Composite on white: (..., H, W, 4) -> (..., H, W, 3) uint8. fit="box" first scales the ink of one icon to 90 % of
    the canvas, so that a style metric cannot win by the sets' different margins."""
    if fit == "box":
        rgba = _fit_box(rgba)
    alpha = rgba[..., 3:].astype(np.uint16)
    blend = rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha)
    return ((blend + 127) // 255).astype(np.uint8)


def _fit_box(rgba: NDArray[np.uint8], share: float = 0.9) -> NDArray[np.uint8]:
    if rgba.ndim != 3:
        raise ValueError(f"fit='box' takes one icon (H, W, 4); found {rgba.shape}. Loop over the batch.")
    ink = rgba[..., 3] > 8
    if not ink.any():
        return rgba
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    side = rgba.shape[0]
    scale = share * side / max(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    # Pillow resizes RGBA premultiplied, so no dark fringe appears.
    drawing = Image.fromarray(rgba).crop(box).resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(drawing, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(canvas)


def _places(shard: Path) -> Mapping[str, ByteSpan]:
    """Member -> span of its bytes, in a tar shard or a packed (stored) zip."""
    if not zipfile.is_zipfile(shard):
        with tarfile.open(shard, "r:") as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    else:
        with zipfile.ZipFile(shard) as archive, open(shard, "rb") as handle:
            members = [(info.filename, _zip_data(handle, info), info.file_size) for info in archive.infolist()]
    return {name: ByteSpan(shard, offset, size) for name, offset, size in members if size <= _MAX_MEMBER}


def _zip_data(handle: BinaryIO, info: zipfile.ZipInfo) -> int:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"{handle.name}: {info.filename} is compressed; a packed icon world stores its files uncompressed."
        )
    handle.seek(info.header_offset + 26)  # the local header's own lengths of name and extra field, behind 26 bytes
    name, extra = struct.unpack("<HH", handle.read(4))
    return info.header_offset + 30 + name + extra


def _check_known(column: str, wanted: Collection[str], known: Collection[str]) -> None:
    if isinstance(wanted, str):
        raise ValueError(f"The filter of {column} is the string {wanted!r}; give a collection, as in ({wanted!r},).")
    if not set(known).intersection(wanted):
        raise ValueError(f"No icon has {column} in {sorted(wanted)}; this world has {sorted(known)}.")
