"""Training pairs: a target, its caption and its references by role.

There are two layouts. A folder as `datasets.load_dataset("imagefolder")` reads it has a `metadata.jsonl` with one row
for each target,

    {"file_name": "t/1.png", "text": "...", "style_file_names": ["r/1a.png", "r/1b.png"], "edges_file_name": "e/1.png"}

where every `ROLE_file_name` or `ROLE_file_names` is a role. In WebDataset's tars `KEY.png` is the target, `KEY.txt` or
`KEY.json` (its "text") the caption, `KEY.ROLE.png` or `KEY.ROLE_0.png`, `KEY.ROLE_1.png`, ... the references.

If images are each other's references, rows name what they share instead: `"style_group": "prompt 17"`,
`"content_group": "fox"`, in metadata.jsonl or `KEY.json` (see data/grouped.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from condit.data.files import hash_file
from condit.data.images import ImageSource, load_image

METADATA, CARD = "metadata.jsonl", "card.json"
SHARDS_OPEN = 8  # tars whose index is in memory; about 1 KB a row
PICTURES = ("png", "jpg", "jpeg", "webp")
_ROLE = re.compile(r"(.+)_file_names?")
_GROUP = re.compile(r"(.+)_group")


@dataclass(frozen=True)
class Pair:
    """A target, its caption and its references by role, as sources for `load_image`."""

    image: ImageSource
    text: str
    references: Mapping[str, tuple[ImageSource, ...]]
    groups: Mapping[str, str] = field(default_factory=dict)  # its groups of targets: "style" -> a name
    columns: Mapping[str, object] = field(default_factory=dict)  # what else its row says: seed, licence, ...

    def one(self, role: str) -> ImageSource:
        """The first reference of a role. KeyError lists the roles of this pair."""
        if not self.references.get(role):
            raise KeyError(f"no reference {role!r}; this pair has {', '.join(self.references) or 'none'}.")
        return self.references[role][0]


class Pairs(Protocol):
    """A set of pairs with random access, so that a batch depends on its row numbers only."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


@dataclass(frozen=True)
class FolderPairs:
    """Rows of metadata.jsonl."""

    rows: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return self.rows[index]


@dataclass(frozen=True)
class TarPairs:
    """Samples of WebDataset tars with random access instead of a stream, so that a run resumes exactly."""

    samples: tuple[tuple[Path, Mapping[str, tuple[int, int]]], ...]  # extension -> (offset, size)

    def __len__(self) -> int:
        return len(self.samples)

    def roles_and_groups(self, index: int) -> tuple[tuple[str, ...], Mapping[str, str]]:
        """Roles and groups of a sample, without its images."""
        tar, parts = self.samples[index]
        roles = tuple(dict.fromkeys(_role(e) for e in parts if "." in e))
        if "json" not in parts:
            return roles, {}
        offset, size = parts["json"]
        with open(tar, "rb") as file:
            file.seek(offset)
            return roles, _groups(json.loads(file.read(size)))

    def __getitem__(self, index: int) -> Pair:
        tar, parts = self.samples[index]
        with open(tar, "rb") as file:

            def read(extension: str) -> bytes:
                offset, size = parts[extension]
                file.seek(offset)
                return file.read(size)

            references: dict[str, list[bytes]] = {}
            for extension in sorted((e for e in parts if "." in e), key=_natural):
                references.setdefault(_role(extension), []).append(read(extension))
            target = next(read(e) for e in PICTURES if e in parts)
            metadata = json.loads(read("json")) if "json" in parts else {}
            if not isinstance(metadata, dict):
                raise ValueError("its .json is not an object")
            text = read("txt").decode() if "txt" in parts else metadata["text"]
        roles = {role: tuple(images) for role, images in references.items()}
        return Pair(target, text, roles, _groups(metadata), _columns(metadata))


class ShardPairs:
    """Tars whose card counts their rows: only the tars of the last rows that were read are indexed, so that opening a
    set takes no longer, and no more memory, the more rows it has."""

    def __init__(self, shards: Sequence[tuple[Path, int]]):
        self.shards = tuple(shards)
        self.ends = list(accumulate(count for _, count in shards))
        self.shard = lru_cache(SHARDS_OPEN)(self._shard)

    def __len__(self) -> int:
        return self.ends[-1]

    def _shard(self, number: int) -> TarPairs:
        """The pairs of a tar. ValueError if they are not as many as the card says."""
        tar, count = self.shards[number]
        pairs = _open_tars([tar])
        if len(pairs) != count:
            raise ValueError(f"{tar} has {len(pairs)} rows; {tar.parent / CARD} says {count}. Copy the set again.")
        return pairs

    def batch(self, rng: random.Random, size: int, below: int) -> list[int]:
        """Random row numbers of one tar, less than `below`; each row is as likely as any other."""
        number = bisect_right(self.ends, rng.randrange(below))
        first = self.ends[number] - self.shards[number][1]
        return [rng.randrange(first, min(self.ends[number], below)) for _ in range(size)]

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        return self.shard(number)[index - self.ends[number] + self.shards[number][1]]


@dataclass(frozen=True)
class Report:
    """The result of `check`: the number of pairs, of pairs with each role, a line for each bad row, and the number of
    groups of each kind with two rows or more."""

    pairs: int
    roles: Mapping[str, int]
    problems: tuple[str, ...]
    groups: Mapping[str, int] = field(default_factory=dict)


def open_pairs(source: str | Path) -> Pairs:
    """The pairs of a folder with metadata.jsonl, of a tar, or of a folder of tars. ValueError quotes the first bad row;
    of tars with a card (`condit data filter` writes one) when it is read."""
    path = Path(source)
    if (path / METADATA).is_file():
        rows = []
        for place, row in json_rows(path / METADATA):
            problem, pair = _folder_pair(path, row)
            if pair is None:
                raise ValueError(f"{place}: {problem}. Row: {_quoted(row)}")
            rows.append(pair)
        return FolderPairs(tuple(rows))
    return ShardPairs(shards) if (shards := _card_shards(path)) else _open_tars(_tars(path))


def _card_shards(folder: Path) -> list[tuple[Path, int]]:
    """The tars of a folder and their numbers of rows by its card; empty without a card of tars."""
    if not (folder / CARD).is_file():
        return []
    try:
        shards = json.loads((folder / CARD).read_text(encoding="utf-8"))["shards"]
        return [(folder / Path(shard["name"]).name, int(shard["rows"])) for shard in shards]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} is damaged ({error!r}). Restore or delete it.") from error


def _open_tars(tars: Sequence[Path]) -> TarPairs:
    samples = []
    for place, tar, parts in _tar_samples(tars):
        problem = _bad_sample(parts)
        if problem:
            raise ValueError(f"{place}: {problem}. Found: {', '.join(parts)}")
        samples.append((tar, parts))
    return TarPairs(tuple(samples))


def fingerprint(source: str | Path) -> str:
    """16 hex digits that change with the rows of a set: a name for caches of results computed from it."""
    path = Path(source)
    if (path / METADATA).is_file():
        return hash_file(path / METADATA)
    stats = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in _tars(path)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def check(source: str | Path, *, decode: bool = True) -> Report:
    """Check every row of a set: names, files, captions and, with `decode`, whether each image can be read."""
    path, problems, roles, count = Path(source), [], {}, 0
    sizes: Counter[tuple[str, str]] = Counter()
    for place, pair in stream(path):
        count += 1
        if isinstance(pair, str):
            problems.append(f"{place}: {pair}")
            continue
        for role in pair.references:
            roles[role] = roles.get(role, 0) + 1
        sizes.update(pair.groups.items())
        named = [("target", pair.image), *((role, x) for role, xs in pair.references.items() for x in xs)]
        for role, picture in named if decode else ():
            try:
                load_image(picture)
            except (ValueError, FileNotFoundError) as error:
                problems.append(f"{place}: {role}: {error}")
    if not count:
        problems.append(f"{path} has no pair")
    groups = Counter(kind for (kind, _), rows in sizes.items() if rows > 1)
    return Report(count, roles, tuple(problems), dict(groups))


def stream(path: Path) -> Iterator[tuple[str, Pair | str]]:
    """Place of every row, and its pair or the text of its problem; one tar or row at a time in memory."""
    if (path / METADATA).is_file():
        for place, row in json_rows(path / METADATA):
            problem, pair = _folder_pair(path, row)
            yield place, f"{problem}. Row: {_quoted(row)}" if pair is None else pair
        return
    for file in _tars(path):
        try:
            samples = list(_tar_samples([file]))
        except ValueError as error:
            yield file.name, str(error)
            continue
        for place, tar, parts in samples:
            problem = _bad_sample(parts)
            if problem:
                yield place, f"{problem}. Found: {', '.join(parts)}"
                continue
            try:
                yield place, TarPairs(((tar, parts),))[0]
            except (ValueError, KeyError, TypeError, RecursionError) as error:  # a caption that is not text
                yield place, f"the caption cannot be read: {error}"


def json_rows(file: Path) -> Iterator[tuple[str, object]]:
    """Place and content of every line that is not empty; the text of a line that is not JSON."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
                    row = line.strip().decode(errors="replace")
                yield f"{file.name}:{number}", row


def _folder_pair(folder: Path, row: object) -> tuple[str, Pair | None]:
    """The problem of a row, or "" and its pair. Files must be in the folder."""
    if not isinstance(row, dict):
        return "not a JSON object", None
    if not isinstance(row.get("file_name"), str):
        return f"file_name must name the target; found {row.get('file_name')!r}", None
    if not isinstance(row.get("text", ""), str):
        return f"text must be a string; found {row['text']!r}", None
    root = folder.resolve()

    def located(column: str, name: object) -> Path:
        if not isinstance(name, str):
            raise ValueError(f"{column} must hold file names; found {name!r}")
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{column}: {name!r} is outside the folder")
        if not path.is_file():
            raise ValueError(f"{column}: no file {name!r}")
        return path

    references: dict[str, tuple[ImageSource, ...]] = {}
    try:
        target = located("file_name", row["file_name"])
        for column, value in row.items():
            match = _ROLE.fullmatch(column)
            if match is None or value is None:
                continue
            is_list = column.endswith("s")
            if is_list != isinstance(value, list):
                expected = "a list of names" if is_list else "one name"
                raise ValueError(f"{column} must be {expected}; found {value!r}")
            files = tuple(located(column, name) for name in (value if is_list else [value]))
            references[match[1]] = (*references.get(match[1], ()), *files)
        groups = _groups(row)
    except ValueError as error:
        return str(error), None
    except OSError as error:  # a name that is too long, a folder that may not be read
        return f"{error.strerror}: {_quoted(error.filename)}", None
    return "", Pair(target, row.get("text", ""), references, groups, _columns(row))


def _columns(row: Mapping[str, object]) -> dict[str, object]:
    """What a row says apart from its files, text and groups."""
    known = ("file_name", "text")
    return {k: v for k, v in row.items() if k not in known and not (_ROLE.fullmatch(k) or _GROUP.fullmatch(k))}


def _groups(row: Mapping[str, object]) -> dict[str, str]:
    """The groups of a row by role. ValueError for a name that is not text."""
    groups = {}
    for column, value in row.items():
        match = _GROUP.fullmatch(column)
        if match is None or value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(f"{column} must be a name; found {value!r}")
        groups[match[1]] = value
    return groups


def _tars(path: Path) -> list[Path]:
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.suffix == ".tar" and path.is_file() else []
    if not tars:
        raise ValueError(
            f"{path} has no pairs: expected a folder with {METADATA} (as datasets' imagefolder reads it), a .tar in "
            "WebDataset's layout, or a folder of such files."
        )
    return tars


def _tar_samples(tars: Sequence[Path]) -> Iterator[tuple[str, Path, dict[str, tuple[int, int]]]]:
    """Place, tar and parts of each sample: files of a folder whose names agree up to the first dot."""
    for tar in tars:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(tar, "r:") as file:  # never unpacked, so an unsafe path has no effect
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    key, dot, extension = name.partition(".")
                    if member.isfile() and dot and key:
                        samples.setdefault(f"{folder}/{key}", {})[extension] = member.offset_data, member.size
        except tarfile.TarError as error:
            raise ValueError(f"{tar} is not a plain tar, or truncated: {error}. Download it again.") from error
        for key, parts in samples.items():
            yield f"{tar.name}:{key.lstrip('/')}", tar, parts


def _bad_sample(parts: Mapping[str, tuple[int, int]]) -> str:
    if not any(e in parts for e in PICTURES):
        return f"no target (.{', .'.join(PICTURES)})"
    if "txt" not in parts and "json" not in parts:
        return "no caption (.txt, or .json with its text)"
    wrong = [e for e in parts if "." in e and e.rpartition(".")[2] not in PICTURES]
    return f".{wrong[0]} is not a supported image" if wrong else ""


def _role(extension: str) -> str:
    """'style.png' and 'style_2.png' -> 'style'."""
    return re.sub(r"_\d+$", "", extension.rpartition(".")[0])


def _natural(text: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _quoted(row: object, limit: int = 200) -> str:
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + " ..."
