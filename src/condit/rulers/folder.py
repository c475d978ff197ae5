"""Folders of pictures as a table: which output belongs to which method, strength, prompt, content and style.

    OUTPUT/METHOD/STRENGTH/NAME.png     or METHOD/NAME.png, or NAME.png

A row of OUTPUT/metadata.jsonl names one picture by its path, or the pictures of all methods by their NAME:
`{"file_name": "a.png", "text": "a fox", "content_file_name": "fox.png", "style_file_name": "ink/3.png"}`. Rows of
the other two folders' metadata.jsonl give `text` (what a picture shows), `style_text`, `style_group`, `content_group`.
Without rows NAME is CONTENT__STYLE or the name of both, `.txt` files hold texts, and a subfolder is a group.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from condit.data.files import hash_file, read_bounded
from condit.data.pairs import METADATA, json_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXT_BYTES = 10_000
_SPLIT = re.compile(r"__|_stylized_|\+")
Row = Mapping[str, object]


@dataclass(frozen=True)
class Picture:
    """A picture that outputs are compared with. text: what it shows. style, content: its groups, None if unknown."""

    path: Path
    hash: str
    text: str = ""
    style_text: str = ""
    style: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class Output:
    """A picture of a method. name: what it shares with the pictures of other methods for the same task."""

    method: str
    strength: float | None
    name: str
    path: Path
    hash: str
    prompt: str
    content: Picture | None
    style: Picture | None

    @property
    def cluster(self) -> str:
        """Pictures of one content hang together: intervals draw them as one."""
        content = self.content and (self.content.content or self.content.hash)
        return content or self.prompt or self.name

    @property
    def key(self) -> tuple[str, float | None]:
        return self.method, self.strength


@dataclass(frozen=True)
class Collection:
    """problems: kind -> what was found, in words."""

    outputs: tuple[Output, ...]
    contents: tuple[Picture, ...]
    styles: tuple[Picture, ...]
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read_collection(output: Path, content: Path | None, style: Path | None) -> Collection:
    """The table of three folders. Broken rows and what is missing or doubtful are among its problems. ValueError for a
    folder that does not exist or an output folder without pictures."""
    problems: dict[str, list[str]] = defaultdict(list)
    contents, styles = (read_pictures(folder, problems) for folder in (content, style))
    rows = read_rows(output, problems)
    outputs, seen = [], set()
    for path in picture_files(output):
        relative = path.relative_to(output)
        method, strength, name = place_of(relative, output.absolute().name)
        row = next((rows[k] for k in (relative.as_posix(), f"{name}{path.suffix}", name, path.name) if k in rows), {})
        seen.add(relative.as_posix())
        shown, look = matched(name, row, contents, "content"), matched(name, row, styles, "style")
        if style is not None and look is None:
            problems["without a style reference"].append(relative.as_posix())
        if content is not None and shown is None:
            problems["without a content picture"].append(relative.as_posix())
        prompt = _text(row, "text") or sidecar(path) or (shown.text if shown else "")
        method, strength = _text(row, "method") or method, _number(row, "strength", strength, problems)
        outputs.append(Output(method, strength, name, path, hash_file(path), prompt, shown, look))
    if not outputs:
        raise ValueError(f"{output} holds no pictures; expected METHOD/STRENGTH/NAME.png")
    problems["missing"] += [f"{name} (metadata.jsonl)" for name in rows if "/" in name and name not in seen]
    _check_groups(outputs, [name for name in rows if "/" not in name], problems)
    shown, looks = (tuple({p.hash: p for p in found.values()}.values()) for found in (contents, styles))
    return Collection(tuple(outputs), shown, looks, problems)


def _check_groups(outputs: list[Output], named: list[str], problems: dict[str, list[str]]) -> None:
    """Pictures that other methods have, the same file twice in a group, methods without a strength."""
    names = {o.name for o in outputs} | {Path(name).stem for name in named}
    groups: dict[tuple[str, float | None], list[Output]] = defaultdict(list)
    for o in outputs:
        groups[o.key].append(o)
    for key, group in groups.items():
        missing = sorted(names - {o.name for o in group})
        problems["missing"] += [f"{label(*key)}: {name}" for name in missing]
        counts = Counter(o.hash for o in group)
        problems["duplicate"] += [f"{label(*key)}: {o.name}" for o in group if counts[o.hash] > 1]
    problems["without a strength"] += sorted({method for method, strength in groups if strength is None})


def label(method: str, strength: float | None) -> str:
    return method if strength is None else f"{method} {strength:g}"


def place_of(relative: Path, default: str) -> tuple[str, float | None, str]:
    """Method, strength and name of a path in the output folder."""
    *folders, file = relative.parts
    method, rest, strength = (folders[0] if folders else default), folders[1:], None
    if rest:
        try:
            strength = float(rest[0])
        except ValueError:
            strength = math.nan
        if math.isfinite(strength):
            rest = rest[1:]
        else:
            method, strength, rest = "/".join(folders), None, []
    return method, strength, "/".join([*rest, Path(file).stem])


def matched(name: str, row: Row, pictures: Mapping[str, Picture], role: str) -> Picture | None:
    """The content or style of an output: by its row, by half of its name, by its name, or the only one."""
    wanted = row.get(f"{role}_file_name")
    if isinstance(wanted, str):
        return pictures.get(wanted) or pictures.get(Path(wanted).stem)
    halves = _SPLIT.split(name.rpartition("/")[2])
    if len(halves) == 2 and (half := halves[0 if role == "content" else 1]) in pictures:
        return pictures[half]
    if name in pictures:
        return pictures[name]
    return next(iter(pictures.values())) if len({p.hash for p in pictures.values()}) == 1 else None


def read_pictures(folder: Path | None, problems: dict[str, list[str]]) -> dict[str, Picture]:
    """The pictures of a folder by path, by name and by stem; of several with one name the first."""
    found: dict[str, Picture] = {}
    if folder is None:
        return found
    rows = read_rows(folder, problems)
    for path in picture_files(folder):
        relative = path.relative_to(folder)
        row = rows.get(relative.as_posix()) or rows.get(path.stem) or {}
        group = relative.parts[0] if len(relative.parts) > 1 else None
        picture = Picture(
            path,
            hash_file(path),
            _text(row, "label") or _text(row, "text") or sidecar(path),
            _text(row, "style_text"),
            _text(row, "style_group") or group,
            _text(row, "content_group") or None,
        )
        for key in (relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem):
            found.setdefault(key, picture)
    return found


def picture_files(folder: Path) -> Iterator[Path]:
    """In order; hidden files and folders are left out. ValueError for a folder that does not exist."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def read_rows(folder: Path, problems: dict[str, list[str]]) -> dict[str, Row]:
    """The rows of metadata.jsonl by `file_name`, which may lack its suffix."""
    file, rows = folder / METADATA, {}
    if file.is_file():
        for place, row in json_rows(file):
            if isinstance(row, dict) and isinstance(row.get("file_name"), str):
                rows[row["file_name"]] = row
            else:
                problems["broken row"].append(f"{place}: expected an object with file_name")
    return rows


def sidecar(path: Path) -> str:
    """The text beside a picture, in a file of its name that ends in .txt."""
    file = path.with_suffix(".txt")
    return read_bounded(file, TEXT_BYTES).decode(errors="replace").strip() if file.is_file() else ""


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return value if isinstance(value, str) else ""


def _number(row: Row, column: str, default: float | None, problems: dict[str, list[str]]) -> float | None:
    value = row.get(column, default)
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return None if value is None else float(value)
    problems["broken row"].append(f"{row.get('file_name')}: {column} must be a number; found {value!r}")
    return default
