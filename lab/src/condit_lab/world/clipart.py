"""Open Clip Art (public domain) from Debian's package: its drawings, their titles and authors. An author is a style."""

from __future__ import annotations

import hashlib
import html
import io
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from condit_lab.world.emoji import slug
from condit_lab.world.names import Phrase, singular
from condit_lab.world.sets import Look, looks

SOURCE = "openclipart"
DEB = "openclipart-svg"
DEB_VERSION = "1:0.18+dfsg-19"
DEB_FILE = "openclipart-svg_1%3a0.18+dfsg-19_all.deb"
DEB_SHA256 = "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
URL = "https://openclipart.org"
LICENCE = "public-domain"

_ROOT = "./usr/share/openclipart/svg/"
_FOLDERS = (
    "animals/",
    "buildings/",
    "computer/hardware/",
    "education/",
    "electronics/",
    "food/",
    "office/",
    "people/",
    "plants/",
    "recreation/",
    "science/",
    "tools/",
    "transportation/",
    "unsorted/",
)
_NOT = ("recreation/games/", "transportation/roadsigns/", "transportation/aiga-symbols/", "unsorted/duplicates/")
_MAX_BYTES = 400_000
# Last words of a title that do not name the thing ("man head", "RPG map").
_NO_HEAD = {"head", "map", "model", "sign", "signs", "scan", "link", "group", "part", "record", "page", "file"}
_MIXED, _INK = "clipart", "clipart-ink"
_SERIES = 4  # drawings of one title above which it names the series


@dataclass(frozen=True)
class ClipartDrawing:
    """One drawing: its path inside the package, its style and what its title names."""

    path: str
    style: str
    phrase: Phrase


def fetch_clipart(folder: Path) -> Path:
    """The Debian package in folder, downloaded by apt-get where it is missing, checked by hash."""
    file = folder / DEB_FILE
    if not file.is_file():
        if shutil.which("apt-get") is None:
            raise ValueError(
                f"{file} is missing and apt-get is not installed. Download {DEB} {DEB_VERSION} and put it there."
            )
        done = subprocess.run(
            ["apt-get", "download", f"{DEB}={DEB_VERSION}"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode or not file.is_file():
            raise ValueError(f"apt-get download {DEB} failed: {done.stderr.strip()[-300:]}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != DEB_SHA256:
        raise ValueError(f"{file} has sha256 {digest}; expected {DEB_SHA256}. Remove the file and fetch it again.")
    return file


def documents(deb: Path) -> Iterator[tuple[str, str]]:
    """(path, SVG document) of the folders that show things, sorted as packed."""
    with tarfile.open(fileobj=io.BytesIO(_data_member(deb.read_bytes())), mode="r|*") as tar:
        for member in tar:
            path = member.name.removeprefix(_ROOT)
            if not path.endswith(".svg") or not path.startswith(_FOLDERS) or path.startswith(_NOT):
                continue
            handle = tar.extractfile(member) if member.isreg() and member.size <= _MAX_BYTES else None
            if handle is not None:
                yield path, handle.read().decode("utf-8", "replace")


def clips(deb: Path, known: Mapping[str, Phrase]) -> list[ClipartDrawing]:
    """Drawings in the public domain whose title, or file name for a whole series of one title, names a known thing."""
    entries = [
        (path, _field(document, "title"), slug(_field(document, "creator")))
        for path, document in documents(deb)
        if "PublicDomain" in document
    ]
    titles = Counter(title for _, title, _ in entries)
    authors = {look.affix: look.key for look in clipart_looks().values() if look.affix}
    out = []
    for path, title, author in entries:
        stem = Path(path).stem
        phrase = title_phrase(title if titles[title] <= _SERIES else stem, known)
        if phrase is not None:
            style = next((key for affix, key in authors.items() if affix in author), _MIXED)
            out.append(ClipartDrawing(path, _INK if re.search(r"(^|_)bw(_|$)", stem) else style, phrase))
    return sorted(out, key=lambda clip: (clip.style, clip.path))


def title_phrase(title: str, known: Mapping[str, Phrase]) -> Phrase | None:
    """The thing that a title ends with: "Old_truck 2" -> truck; None where that is no known phrase."""
    words = [word for word in slug(re.sub(r"\([^)]*\)", "", title).replace("_", " ")).split("-") if word]
    while words and re.fullmatch(r"\d+|v\d|aj|bw|color|remix|icon|clipart", words[-1]):
        words = words[:-1]
    for start in range(max(0, len(words) - 3), len(words)):
        key = "-".join(words[start:])
        phrase = known.get(key) or known.get(singular(key))
        if phrase is not None:
            return None if key in _NO_HEAD and start > 0 else phrase
    return None


def clipart_looks() -> dict[str, Look]:
    """Styles of the package by key."""
    return {look.key: look for look in looks() if look.icon_set == SOURCE}


def _field(document: str, name: str) -> str:
    """Text of a Dublin Core field of the drawing's metadata."""
    match = re.search(rf"<dc:{name}\b[^>]*>(.*?)</dc:{name}>", document, re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", match[1]))).strip() if match else ""


def _data_member(archive: bytes) -> bytes:
    """`data.tar.*` of a .deb, which is an ar archive: 60-byte headers, members padded to even length."""
    at = 8
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip(), int(archive[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("The Debian package has no data.tar. Remove the file and fetch it again.")
