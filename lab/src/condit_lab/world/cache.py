"""Rasters that were drawn already, so that a stopped build goes on where it stopped: one pair of files a style,
`<style>.bin` (zlib of RGBA) and `<style>.tsv` (name, offset, size; size 0 = cannot be drawn), both appended to."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from condit_lab.icons.world import SIZE


class RasterCache:
    """The rasters of one style in a folder."""

    def __init__(self, folder: Path, style: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._bin, self._index = folder / f"{style}.bin", folder / f"{style}.tsv"
        self._places: dict[str, tuple[int, int]] = {}
        if self._index.is_file():
            whole = self._index.read_text(encoding="utf-8").split("\n")[:-1]  # a broken last line has no end
            for line in whole:
                name, offset, size = line.split("\t")
                self._places[name] = (int(offset), int(size))
            if self._index.stat().st_size != sum(len(line.encode()) + 1 for line in whole):
                self._index.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def drawn(self, name: str) -> bool:
        return self._places[name][1] > 0

    def add(self, rasters: Iterable[tuple[str, NDArray[np.uint8] | None]]) -> Iterator[str]:
        """Append (name, raster) pairs, yielding each name once it is on disk."""
        with open(self._bin, "ab") as data, open(self._index, "a", encoding="utf-8") as index:
            for name, rgba in rasters:
                blob = b"" if rgba is None else zlib.compress(rgba.tobytes(), 1)
                place = (data.tell(), len(blob))
                data.write(blob)
                data.flush()  # the raster before its line: a line never names bytes that are not there
                index.write(f"{name}\t{place[0]}\t{place[1]}\n")
                self._places[name] = place
                yield name

    def read(self, names: Iterable[str]) -> Iterator[NDArray[np.uint8]]:
        """The rasters of these names, (128, 128, 4) uint8."""
        with open(self._bin, "rb") as data:
            for name in names:
                offset, size = self._places[name]
                data.seek(offset)
                yield np.frombuffer(zlib.decompress(data.read(size)), np.uint8).reshape(SIZE, SIZE, 4)
