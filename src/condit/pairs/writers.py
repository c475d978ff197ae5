"""Sets on disk: WebDataset's tars of bounded size, or a folder that `datasets` reads as an imagefolder. Equal rows in
equal order give equal bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from condit.data.files import atomic_write, fsync_path, read_bounded, temporary_path, write_error
from condit.data.images import MAX_BYTES, MAX_PIXELS, ImageSource, load_image
from condit.data.pairs import METADATA, Pair

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # others are stored as PNG
SHARD_ROWS, SHARD_BYTES = 1000, 1_000_000_000

Layout = Literal["tar", "folder"]


def read_bytes(source: ImageSource) -> bytes:
    """The file of an image: of a path its bytes, at most MAX_BYTES, of pixels a PNG. ValueError for a larger file."""
    if isinstance(source, str | Path):
        source = read_bounded(source, MAX_BYTES)
    if isinstance(source, bytes):
        if len(source) > MAX_BYTES:
            raise ValueError(f"the image has more than {MAX_BYTES // 10**6} MB")
        return source
    buffer = io.BytesIO()
    load_image(source).save(buffer, "PNG")
    return buffer.getvalue()


def header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format and (width, height) of an image file by its header; nothing is decoded. ValueError if it is none, or for
    more than MAX_PIXELS."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            name, size = image.format or "", image.size
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels; the limit is {MAX_PIXELS / 1e6:g} million")
    return name, size


def encoded(source: ImageSource) -> tuple[bytes, str]:
    """An image's file and its suffix; its bytes are kept where training and `datasets` read the format."""
    data = read_bytes(source)
    suffix = SUFFIXES.get(header(data)[0])
    return (data, suffix) if suffix else (read_bytes(load_image(data)), "png")


def row_columns(pair: Pair) -> dict[str, object]:
    """The groups and other columns of a row."""
    return {f"{kind}_group": name for kind, name in pair.groups.items()} | dict(pair.columns)


class TarWriter:
    """Tars of `rows` rows, or 1 GB, each; a tar gets its name when it is whole."""

    def __init__(self, folder: Path, rows: int = SHARD_ROWS):
        self.folder, self.rows, self.shards = folder, rows, list[dict[str, object]]()
        self.count = self.size = self.number = 0
        self.tar: tarfile.TarFile | None = None

    def write(self, pair: Pair) -> None:
        parts = [("", encoded(pair.image))]
        for role, images in pair.references.items():
            parts += [(f".{role}_{i}", encoded(image)) for i, image in enumerate(images)]
        if self.count == 0:
            self.path = self.folder / f"{len(self.shards):06d}.tar"
            self.temporary = temporary_path(self.path)
            self.tar = tarfile.open(self.temporary, mode="w")  # noqa: SIM115 - it is open for many rows
        key = f"{self.number:09d}"
        for name, (data, suffix) in parts:
            self.add(f"{key}{name}.{suffix}", data)
        self.add(f"{key}.txt", pair.text.encode())
        self.add(f"{key}.json", json.dumps(row_columns(pair), ensure_ascii=False).encode())
        self.count, self.number = self.count + 1, self.number + 1
        if self.count == self.rows or self.size > SHARD_BYTES:
            self.end_shard()

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # no time and no owner, so that equal rows give equal tars
        member.size = len(data)
        assert self.tar is not None
        self.tar.addfile(member, io.BytesIO(data))
        self.size += len(data)

    def end_shard(self) -> None:
        try:
            self.close()
            with open(self.temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            fsync_path(self.temporary)
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise write_error(error, self.path) from error
        shard = {"name": self.path.name, "rows": self.count, "bytes": self.path.stat().st_size, "sha256": digest}
        self.shards.append(shard)
        self.count = self.size = 0

    def finish(self) -> list[dict[str, object]]:
        """Ends the last tar. Returns name, rows, bytes and sha256 of each."""
        if self.count:
            self.end_shard()
        return self.shards

    def close(self) -> None:
        """Closes what an error left open."""
        if self.tar is not None:
            self.tar.close()


class FolderWriter:
    """Images by their content, so that a reference of many rows is one file, and metadata.jsonl, written last."""

    def __init__(self, folder: Path, rows: int = SHARD_ROWS):
        self.folder, self.count = folder, 0
        self.temporary = temporary_path(folder / METADATA)
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = open(self.temporary, "w", encoding="utf-8")  # noqa: SIM115 - as above

    def place(self, source: ImageSource) -> str:
        data, suffix = encoded(source)
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"images/{digest[:2]}/{digest}.{suffix}"
        if not (self.folder / name).is_file():
            atomic_write(self.folder / name, lambda path: path.write_bytes(data))
        return name

    def write(self, pair: Pair) -> None:
        row = {"file_name": self.place(pair.image), "text": pair.text}
        row |= {f"{role}_file_names": [self.place(x) for x in images] for role, images in pair.references.items()}
        self.lines.write(json.dumps(row | row_columns(pair), ensure_ascii=False) + "\n")
        self.count += 1

    def finish(self) -> list[dict[str, object]]:
        """Writes metadata.jsonl. Returns its name, rows, bytes and sha256."""
        self.lines.close()
        path = self.folder / METADATA
        fsync_path(self.temporary)
        os.replace(self.temporary, path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [{"name": path.name, "rows": self.count, "bytes": path.stat().st_size, "sha256": digest}]

    def close(self) -> None:
        """Closes what an error left open."""
        self.lines.close()


WRITERS: dict[Layout, type[TarWriter] | type[FolderWriter]] = {"tar": TarWriter, "folder": FolderWriter}
