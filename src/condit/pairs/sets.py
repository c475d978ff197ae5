"""Sets on disk with a card: WebDataset's tars of bounded size, or a folder that `datasets` reads as an imagefolder.
Equal rows in equal order give equal bytes."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from condit import __version__
from condit.data.files import atomic_write, hash_file, read_bounded, remove_temporaries
from condit.data.images import MAX_BYTES, MAX_PIXELS, ImageSource, load_image
from condit.data.locks import has_files, locked
from condit.data.pairs import CARD, METADATA, Pair, fingerprint
from condit.data.progress import progress_bar

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # others are stored as PNG
SHARD_ROWS, SHARD_BYTES = 1000, 1_000_000_000
ERRORS, PAGE, SETTINGS = "errors.jsonl", "README.md", "settings.json"
LICENCES = 1000  # different ones that a card counts

OnError = Callable[[str, str], None]  # (place of a row, what is wrong with it)
Encoded = tuple[bytes, str]  # a file's bytes and suffix
Files = dict[str, list[Encoded]]  # of a row by role; "" is the target
Fields = Mapping[str, object]


def read_bytes(source: ImageSource) -> bytes:
    """The file of an image: of a path its bytes, of pixels a PNG. ValueError above MAX_BYTES."""
    if isinstance(source, str | Path):
        source = read_bounded(source, MAX_BYTES)
    if not isinstance(source, bytes):
        buffer = io.BytesIO()
        load_image(source).save(buffer, "PNG")
        return buffer.getvalue()
    if len(source) > MAX_BYTES:
        raise ValueError(f"the image has more than {MAX_BYTES // 10**6} MB")
    return source


def header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format and (width, height) of an image file; nothing is decoded. ValueError if it is none, or too large."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            name, size = image.format or "", image.size
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels; the limit is {MAX_PIXELS / 1e6:g} million")
    return name, size


def encoded(source: ImageSource) -> Encoded:
    """An image's file; its bytes are kept where training and `datasets` read the format."""
    data = read_bytes(source)
    suffix = SUFFIXES.get(header(data)[0])
    return (data, suffix) if suffix else (read_bytes(load_image(data)), "png")


def files_of(pair: Pair) -> Files:
    """The files of a row. ValueError for an image that cannot be read or a role that cannot be part of a name."""
    for role in pair.references:
        if not re.fullmatch(r"[\w-]+", role):
            raise ValueError(f"the role {role!r} cannot be part of a file's name")
    return {"": [encoded(pair.image)]} | {role: [encoded(x) for x in xs] for role, xs in pair.references.items()}


def columns_of(pair: Pair) -> dict[str, object]:
    """The groups and other columns of a row."""
    return {f"{kind}_group": name for kind, name in pair.groups.items()} | dict(pair.columns)


def written(path: Path, rows: int) -> dict[str, object]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest}


def write_tars(folder: Path, rows: Iterator[tuple[Pair, Files]], shard_rows: int) -> list[dict[str, object]]:
    """Tars of `shard_rows` rows, or 1 GB, each written whole or not at all. Returns name, rows, bytes and sha256."""
    shards: list[dict[str, object]] = []
    keys, sizes = count(), list[int]()

    def fill(path: Path) -> None:
        sizes.clear()
        with tarfile.open(path, "w") as tar:
            for pair, files in rows:
                texts = pair.text.encode(errors="replace"), json.dumps(columns_of(pair)).encode()
                parts = {f"{role}_{i}" if role else "": x for role, xs in files.items() for i, x in enumerate(xs)}
                parts |= {"txt": (texts[0], ""), "json": (texts[1], "")}
                key = f"{next(keys):09d}"
                for name, (data, suffix) in parts.items():
                    # Without time and owner, so that equal rows give equal tars.
                    member = tarfile.TarInfo(".".join(part for part in (key, name, suffix) if part))
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                sizes.append(sum(len(data) for data, _ in parts.values()))
                if len(sizes) == shard_rows or sum(sizes) > SHARD_BYTES:
                    return

    while not shards or len(sizes) == shard_rows or sum(sizes) > SHARD_BYTES:
        path = atomic_write(folder / f"{len(shards):06d}.tar", fill)
        shards.append(written(path, len(sizes)))
    if not sizes:  # the rows ended with the tar before
        (folder / str(shards.pop()["name"])).unlink()
    return shards


def write_folder(folder: Path, rows: Iterator[tuple[Pair, Files]], shard_rows: int) -> list[dict[str, object]]:
    """Images named by their content, so that a reference of many rows is one file, and metadata.jsonl, written last."""

    def place(file: Encoded) -> str:
        digest = hashlib.sha256(file[0]).hexdigest()[:32]
        name = f"images/{digest[:2]}/{digest}.{file[1]}"
        if not (folder / name).is_file():
            atomic_write(folder / name, lambda path: path.write_bytes(file[0]))
        return name

    def fill(path: Path) -> None:
        with open(path, "w", encoding="utf-8") as lines:
            for pair, files in rows:
                (target, *_), *references = ([place(x) for x in xs] for xs in files.values())
                named = dict(zip((f"{role}_file_names" for role in files if role), references, strict=True))
                row = {"file_name": target, "text": pair.text, **named, **columns_of(pair)}
                lines.write(json.dumps(row) + "\n")

    metadata = atomic_write(folder / METADATA, fill)
    with open(metadata, "rb") as file:
        return [written(metadata, sum(1 for _ in file))]


WRITERS = {"tar": write_tars, "folder": write_folder}


@dataclass(frozen=True)
class SetForm:
    """How a set is written. licence: of rows that state none."""

    layout: Literal["tar", "folder"] = "tar"
    shard_rows: int = SHARD_ROWS
    licence: str | None = None


class Census:
    """Counts what a card says of its rows, and names bad ones in errors.jsonl."""

    def __init__(self, out: Path, licence: str | None):
        self.rows, self.problems, self.licence = 0, 0, licence
        self.roles, self.licences = Counter[str](), Counter[str]()
        self.seeds: tuple[int, int] | None = None
        self.errors = open(out / ERRORS, "w", encoding="utf-8")  # noqa: SIM115 - closed with the set

    def on_error(self, place: str, text: str) -> None:
        self.problems += 1
        self.errors.write(json.dumps({"row": place, "error": text}) + "\n")

    def __call__(self, rows: Iterable[tuple[str, Pair]]) -> Iterator[tuple[Pair, Files]]:
        """The rows as files, counted."""
        for place, pair in rows:
            columns = {"licence": pair.columns.get("license") or self.licence} | dict(pair.columns)
            pair = replace(pair, columns={k: v for k, v in columns.items() if v is not None})
            try:
                files = files_of(pair)
            except (ValueError, OSError) as error:
                self.on_error(place, str(error))
                continue
            licence, seed = str(pair.columns.get("licence", "not stated")), pair.columns.get("seed")
            self.licences[licence if licence in self.licences or len(self.licences) < LICENCES else "others"] += 1
            if isinstance(seed, int):
                low, high = self.seeds or (seed, seed)
                self.seeds = min(low, seed), max(high, seed)
            self.roles.update(pair.references.keys())
            self.rows += 1
            yield pair, files


def write_set(
    source: Path,
    out: Path,
    make: Callable[[OnError], Iterable[tuple[str, Pair]]],
    settings: Fields,
    form: SetForm,
    report: Callable[[], Fields] = dict,
) -> dict[str, object]:
    """Writes the rows of make(on_error) and their card, which comes last: a folder with a card is whole. An interrupted
    run starts again and gives the same files. Bad rows are named in errors.jsonl.

    settings: what determines the rows of the source; report: more fields of the card, asked for at the end. ValueError
    for a folder that holds anything else. Returns the card.
    """
    hashed = hash_file(source / CARD) if (source / CARD).is_file() else fingerprint_of(source)
    settings = {**settings, **asdict(form), "source": str(source), "source_hash": hashed}
    with locked(out, "writing a set"):
        same = (out / SETTINGS).is_file() and (out / SETTINGS).read_text(encoding="utf-8") == as_text(settings)
        if not same and has_files(out):
            raise ValueError(f"{out} holds other files. Choose another folder with -o, or empty it.")
        if same and (out / CARD).is_file():
            return json.loads((out / CARD).read_text(encoding="utf-8"))
        remove_temporaries(out)
        atomic_write(out / SETTINGS, lambda path: path.write_text(as_text(settings), encoding="utf-8"))
        census = Census(out, form.licence)
        with census.errors, progress_bar(0, "writing", unit="row"):
            shards = WRITERS[form.layout](out, census(make(census.on_error)), form.shard_rows)
        if not census.problems:
            (out / ERRORS).unlink()
        if not census.rows + census.problems:
            raise ValueError(f"{source} has no rows: expected pictures, a folder with {METADATA}, or tars.")
        card = {
            "rows": census.rows,
            "errors": census.problems,
            "roles": dict(census.roles),
            "licences": dict(census.licences),
            "seeds": census.seeds,
            **report(),
            "settings": settings,
            "condit": __version__,
            "shards" if form.layout == "tar" else "metadata": shards,
        }
        atomic_write(out / PAGE, lambda path: path.write_text(page(card), encoding="utf-8"))
        atomic_write(out / CARD, lambda path: path.write_text(as_text(card), encoding="utf-8"))
        return card


def fingerprint_of(source: Path) -> str | None:
    """The fingerprint of a set; None for a folder of pictures, whose files are not read twice."""
    try:
        return fingerprint(source)
    except ValueError:
        return None


def as_text(value: Fields) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def page(card: Fields) -> str:
    """The card as the README.md of a data set; its shards are in card.json."""

    def table(rows: Fields) -> list[str]:
        return ["", "| | |", "|---|---|", *(f"| {k} | {json.dumps(v, default=str)} |" for k, v in rows.items())]

    filters = card.get("filters")
    lines = ["# Data card", *table({k: v for k, v in card.items() if k not in ("shards", "metadata", "filters")})]
    return "\n".join([*lines, *(table(filters) if isinstance(filters, dict) else [])]) + "\n"
