"""A job as a value: rows of work, the files that each makes, and what a folder already holds of them.

A row is drawn alone, whatever its neighbours and whoever draws it, so its files do not depend on the engine, on the
number of workers or on the order. Each file is written whole or not at all; a second run makes what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from condit.data.files import atomic_write, parse_json
from condit.data.locks import turn

METADATA, ERRORS, SETTINGS = "metadata.jsonl", "errors.jsonl", "settings.json"
MAX_ERRORS = 100  # rows that may fail before a job stops
Save = Callable[[Path], object]  # writes one file whole or not at all, as save_image does


class Stopped(Exception):
    """A job ended before its end, with the reason. What was made is kept; a second run continues."""


@dataclass(frozen=True)
class Row:
    """One piece of work. name: how errors name it. files: what it makes, relative to the job's folder. work: what the
    drawer reads, as JSON, so that it reaches any process. metadata: the line of each file in metadata.jsonl."""

    name: str
    files: tuple[str, ...]
    work: Mapping[str, object]
    metadata: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class Drawer:
    """A loaded model. draw: a row's work -> one Save for each of its files; an exception is that row's error.
    facts: what all workers must agree on, such as the hash of the weights."""

    draw: Callable[[Mapping[str, object]], Sequence[Save]]
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a drawer is opened: the number of the process on its machine, which chooses a GPU."""

    local_rank: int = 0


# Loads the model, once in each process. Processes receive it by pickle: a module's function, or a dataclass of values.
Opener = Callable[[Place], Drawer]


@dataclass(frozen=True)
class Job:
    """Rows to draw in a folder. errors: of rows that could not be read, by their names. settings: what pictures of this
    folder have in common; a folder with others is refused. threads: of each process. They are part of the job, because
    sums of floating point numbers depend on them. remove: files of the folder that are deleted first."""

    folder: Path
    rows: tuple[Row, ...]
    open: Opener
    errors: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    threads: int = 1
    remove: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        owners: dict[str, str] = {}
        if len({row.name for row in self.rows}) < len(self.rows):
            raise ValueError("two rows of the job have the same name")
        for row in self.rows:
            for file in row.files:
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise ValueError(f"{row.name}: {file!r} is outside the job's folder")
                if owners.setdefault(file, row.name) != row.name:
                    raise ValueError(f"{row.name} and {owners[file]} make the same file {file}")


@dataclass(frozen=True)
class RowResult:
    """What became of a row: it is there, or its error. stop: the next rows would fail too (a full disk, a worker
    without the model)."""

    row: str
    error: str | None = None
    stop: bool = False


def content_key(value: object) -> str:
    """16 hex digits of a JSON value: the name of what it describes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def shard_of(row: Row, shards: int) -> int:
    """The shard, from 0, of a row. It depends on the row alone: rows that are added leave the others where they are."""
    return int(content_key([row.files, row.work]), 16) % shards


def files_in(folder: Path, rows: Iterable[Row]) -> set[str]:
    """The files of `rows` that are there; each folder is listed once."""
    wanted = {file for row in rows for file in row.files}
    there: set[str] = set()
    for parent in {Path(file).parent for file in wanted}:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder / parent) as entries:
            there.update((parent / entry.name).as_posix() for entry in entries)
    return there & wanted


def remove_unfinished(folder: Path, names: set[str]) -> None:
    """Removes the temporary files that a killed process left for files of these names, and no others."""
    for parent in {Path(name).parent for name in names}:
        for file in (folder / parent).glob(".*.????????.tmp"):
            if (parent / file.name[1:].rsplit(".", 2)[0]).as_posix() in names:
                file.unlink(missing_ok=True)


def agree(folder: Path, settings: Mapping[str, object], *, fresh: bool) -> None:
    """Compares settings with those in the folder's settings.json and adds new ones to it, in turn with other workers.
    fresh: the folder held no picture when the job began. ValueError, and nothing is changed, for other settings or for
    pictures without."""
    with turn(folder):
        remove_unfinished(folder, {METADATA, ERRORS, SETTINGS})  # written in turn: nobody is writing them now
        _agree(folder, folder / SETTINGS, settings, fresh=fresh)


def _agree(folder: Path, file: Path, settings: Mapping[str, object], *, fresh: bool) -> None:
    made = parse_json(file.read_bytes()) if file.is_file() else {}
    if not isinstance(made, dict):
        raise ValueError(f"{file} is not a JSON object; choose another folder")
    for name, value in settings.items():
        value = json.loads(json.dumps(value))
        if name in made and made[name] != value or name not in made and not fresh:
            was = f"{name} = {made[name]!r}" if name in made else "settings that it does not record"
            raise ValueError(
                f"{folder} holds images made with {was}, not {value!r}. Use the same, or choose another folder."
            )
    if settings.keys() - made.keys():
        write_lines(file, [json.dumps({**made, **settings}, indent=1, sort_keys=True)])


def read_lines(file: Path, key: str) -> dict[str, str]:
    """The lines of a JSON Lines file by the string that each has under `key`. ValueError quotes another line."""
    lines: dict[str, str] = {}
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            value = parse_json(line) if line.strip() else None
            if not isinstance(value, dict) or not isinstance(value.get(key), str):
                raise ValueError(f"{file}:{number}: expected an object with {key!r}; found {line[:80]!r}")
            lines[value[key]] = line
    return lines


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Writes lines, or removes the file if there is none."""
    if lines:
        atomic_write(file, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    else:
        file.unlink(missing_ok=True)


def metadata_lines(job: Job) -> Iterator[str]:
    """metadata.jsonl: a line for each picture that is there, in the order of the rows, after those of earlier jobs in
    this folder."""
    there, own = files_in(job.folder, job.rows), {file for row in job.rows for file in row.files}
    for name, line in read_lines(job.folder / METADATA, "file_name").items():
        if name not in own and (job.folder / name).is_file():
            yield line
    for row in job.rows:
        for file, columns in zip(row.files, row.metadata, strict=False):
            if file in there:
                yield json.dumps({"file_name": file, **columns}, ensure_ascii=False)
