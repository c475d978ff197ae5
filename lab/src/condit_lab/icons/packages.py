"""Icon packages: fetched by `npm pack` at pinned versions, checked by hash, opened as drawings (SVG text or WebP)."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condit_lab.icons.styles import Style, style_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One npm package and the sha256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The tarball's name as `npm pack` writes it: "@a/b" 1.0.0 -> "a-b-1.0.0.tgz"."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")


def package_of(style: Style) -> Package:
    return Package(style.package, style.version, style.sha256)


def fetch(packages: Iterable[Package], folder: Path) -> dict[str, Path]:
    """Package name -> tarball in the folder; absent ones are fetched, all are checked."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {package.name: package for package in packages}
    absent = [package for package in wanted.values() if not (folder / package.file).is_file()]
    if absent and shutil.which("npm") is None:
        raise ValueError(
            f"{absent[0].file} is not in {folder} and npm is not installed. Install Node.js, or fetch the packages "
            "elsewhere with `npm pack NAME@VERSION` and pass their folder."
        )
    for package in absent:
        logger.info("fetching %s %s", package.name, package.version)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / package.file).is_file():
            raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:] or 'it wrote no file'}")
    for package in wanted.values():
        digest = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(
                f"{folder / package.file} has sha256 {digest}; expected {package.sha256}. Remove the file and fetch it "
                "again. If the digest stays the same, the published package has changed: do not use it."
            )
    return {name: folder / package.file for name, package in wanted.items()}


def names(style: str, tarball: Path) -> list[str]:
    """Every icon name of the style's set; variant suffixes ("-bold") are still on."""
    if style == "noto-mono":
        return [f"{code:04X}" for code in sorted(_characters(_font(tarball)))]
    inside = _files_inside(style)
    if inside is None:
        return [name for name, icon in _icon_set(tarball)["icons"].items() if not _retired(style, icon)]
    with tarfile.open(tarball, "r:gz") as tar:
        return sorted(Path(name).stem for name in tar.getnames() if name.startswith(inside[0]))


def drawings(style: str, tarball: Path, wanted: Iterable[str]) -> Iterator[tuple[str, str | bytes]]:
    """(name, drawing) of the wanted names: a square SVG document, or the bytes of a WebP file."""
    wanted = set(wanted)
    inside = _files_inside(style)
    if style == "noto-mono":
        yield from _glyphs(tarball, wanted)
    elif inside is None:
        icons = _icon_set(tarball)
        for name in sorted(wanted):
            icon = icons["icons"][name]
            side = [icon.get(key, icons.get(key, 16)) for key in ("width", "height")]
            yield name, square_svg(icon["body"], icon.get("left", 0), icon.get("top", 0), *side)
    else:
        with tarfile.open(tarball, "r:gz") as tar:
            for member in tar:
                handle = tar.extractfile(member) if Path(member.name).stem in wanted else None
                if handle and member.name.startswith(inside[0]):
                    data = handle.read()
                    yield Path(member.name).stem, data.decode("utf-8") if inside[1] == "svg" else data


def square_svg(body: str, left: float, top: float, width: float, height: float) -> str:
    """An icon's body as a document; a canvas that is not square is padded around its centre."""
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    # Some bodies still say xlink:href: without the second namespace they do not parse.
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{body}</svg>'


def _files_inside(style: str) -> tuple[str, str] | None:
    """Where a package keeps one file an icon; None for iconify's one JSON file."""
    return {
        "openmoji-black": ("package/black/svg/", "svg"),
        "fluent-emoji-3d": ("package/assets/", "webp"),
    }.get(style)


def _retired(style: str, icon: dict) -> bool:
    # Iconify hides what left the set. Of the emoji sets nothing usable is lost by keeping it; UI sets keep misprints.
    return style_of(style).family in ("ph", "solar") and bool(icon.get("hidden"))


def _icon_set(tarball: Path) -> dict:
    return json.loads(_read(tarball, "package/icons.json"))


def _read(tarball: Path, name: str) -> bytes:
    with tarfile.open(tarball, "r:gz") as tar:
        handle = tar.extractfile(name)
        if handle is None:
            raise ValueError(f"{tarball} has no file {name}. Remove it and fetch the pinned version again.")
        return handle.read()


def _font(tarball: Path):
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("Style 'noto-mono' is a font and needs fonttools. Install it: pip install -e lab.") from error
    # The .woff is zlib: unlike .woff2 it needs no brotli.
    return TTFont(io.BytesIO(_read(tarball, "package/files/noto-emoji-emoji-400-normal.woff")))


def _characters(font: Any) -> dict[int, str]:
    glyph_names = font.getBestCmap()
    assert glyph_names is not None  # the pinned font has a table of Unicode
    return glyph_names


def _glyphs(tarball: Path, wanted: Iterable[str]) -> Iterator[tuple[str, str]]:
    from fontTools.pens.boundsPen import BoundsPen
    from fontTools.pens.svgPathPen import SVGPathPen

    font = _font(tarball)
    glyphs, characters = font.getGlyphSet(), _characters(font)
    for name in sorted(wanted):
        glyph = glyphs[characters[int(name, 16)]]
        outline, bounds = SVGPathPen(glyphs), BoundsPen(glyphs)
        glyph.draw(outline)
        glyph.draw(bounds)
        if bounds.bounds is None:
            continue
        left, bottom, right, top = bounds.bounds
        side = max(right - left, top - bottom) / 0.94  # ink fills 94 % of the canvas, as noto's pictures do
        path = f'<path transform="scale(1 -1)" d="{outline.getCommands()}"/>'
        yield name, square_svg(path, (left + right - side) / 2, -(bottom + top + side) / 2, side, side)
