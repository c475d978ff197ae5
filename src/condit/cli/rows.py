"""`condit generate --from ROWS.jsonl`: a request in each row, a file for each image. A second run makes what is
missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from condit.cli.options import OutputOptions, ReferenceOptions, SamplingOptions, StartOptions
from condit.cli.reference import images_of, read_references
from condit.cli.request import Request
from condit.cli.terminal import answer, say
from condit.data.files import parse_json, read_bounded
from condit.data.images import MAX_BYTES, load_image, read_recipe, save_image
from condit.data.progress import progress_bar

if TYPE_CHECKING:
    from condit.cli.request import Studio

REFERENCES = tuple(name for name in ReferenceOptions.__dataclass_fields__ if name != "strength")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FIELDS = ("prompt", *SamplingOptions.__dataclass_fields__, *StartOptions.__dataclass_fields__)


@dataclass(frozen=True)
class Row:
    """A row: its number, from 1, its request and the files of its images."""

    number: int
    request: Request
    paths: tuple[Path, ...]


def generate_rows(
    file: Path, folder: Path, common: Mapping[str, Any], load: Callable[[], Studio], output: OutputOptions
) -> None:
    """Generates what is missing of the rows of `file` in `folder`. Names each broken row, makes the others, and exits
    with 1 if there was one."""
    if folder.suffix and not folder.is_dir():
        raise typer.BadParameter(f"-o {folder}: --from needs a folder")
    rows, problems = read_rows(file, folder, common)
    remove_unfinished(folder, rows)
    todo: list[tuple[Row, list[int]]] = []
    for row in rows:
        try:
            missing = missing_images(row)
        except ValueError as error:
            problems.append(f"{file}:{row.number}: {error}")
            continue
        todo += [(row, missing)] if missing else []
    for problem in problems:
        say(problem)
    made: list[str] = []
    with progress_bar(sum(len(missing) for _, missing in todo), "generating", unit="image") as advance:
        for row, missing in todo:
            try:
                made += generate_row(row, missing, load(), with_recipe=not output.no_metadata)
            except (ValueError, FileNotFoundError) as error:
                problems.append(f"{file}:{row.number}: {error}")
                say(problems[-1])
            advance(len(missing))
    if output.as_json:
        answer({"folder": str(folder), "made": made, "problems": problems})
    else:
        say(f"{len(made)} images made, {sum(len(row.paths) for row in rows) - len(made)} were there or are broken")
        typer.echo(str(folder))
    if problems:
        raise typer.Exit(1)


def generate_row(row: Row, missing: Sequence[int], studio: Studio, *, with_recipe: bool) -> list[str]:
    """Generates a row, and writes its missing images."""
    request = row.request
    for path in (*images_of(request.references), *(p for p in (request.image, request.mask) if p)):
        load_image(path)
    generated = studio.generate(request)
    for index in missing:
        recipe = generated.recipes[index] if with_recipe else None
        parameters = generated.parameters[index] if with_recipe else None
        save_image(generated.images[index], row.paths[index], recipe=recipe, parameters=parameters)
    return [str(row.paths[index]) for index in missing]


def read_rows(file: Path, folder: Path, common: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """The rows of a JSON Lines file over the options of the command line, and what is wrong with the others. Keys are
    the names of options; `name` is that of the image's file, without it the row's number."""
    rows, problems, names = [], [], {}
    try:
        text = read_bounded(file, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = read_row(line, number, folder, common)
            other = names.setdefault(row.paths[0], number)
            if other != number:
                raise ValueError(f"the name {row.paths[0].name} is that of row {other} too")
            rows.append(row)
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    return rows, problems


def read_row(line: str, number: int, folder: Path, common: Mapping[str, Any]) -> Row:
    """A row. Raises ValueError for what it cannot hold."""
    from pydantic import TypeAdapter, ValidationError

    try:
        fields = parse_json(line)
    except ValueError as error:
        raise ValueError(f"this is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError('expected an object, as in {"prompt": "a red apple", "seed": 3}')
    fields = {key.replace("-", "_"): value for key, value in fields.items()}
    name = fields.pop("name", f"{number:05d}")
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"name must be that of a file, without a folder; found {name!r}")
    unknown = sorted(fields.keys() - {*FIELDS, *REFERENCES, "strength"})
    if unknown or "prompt" not in fields:
        raise ValueError(f"no key {unknown[0]!r}; keys are the names of options" if unknown else "no prompt")
    strength = fields.pop("strength", 1.0)
    options = {key: fields.pop(key) for key in REFERENCES if key in fields}
    lists = {key: [value] if isinstance(value, str) else value for key, value in options.items()}
    if not isinstance(strength, int | float) or not all(
        isinstance(values, list) and all(isinstance(value, str) for value in values) for values in lists.values()
    ):
        raise ValueError("references are strings, or lists of them, and strength is a number")
    own = {"references": read_references(lists, strength)} if lists else {}
    try:
        request = TypeAdapter(Request).validate_python({**common, **fields, **own})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")) from None
    path = Path(name if Path(name).suffix.lower() in SUFFIXES else f"{name}.png")
    ends = [""] if request.count == 1 else [f"-{index}" for index in range(request.count)]
    return Row(number, request, tuple(folder / path.with_stem(f"{path.stem}{end}") for end in ends))


def remove_unfinished(folder: Path, rows: Sequence[Row]) -> None:
    """Removes the temporary files of these rows that a killed process left."""
    names = {path.name for row in rows for path in row.paths}
    for file in folder.glob(".*.tmp"):
        if file.name[1:].rsplit(".", 2)[0] in names:
            file.unlink(missing_ok=True)


def missing_images(row: Row) -> list[int]:
    """The numbers of the images that are not there. Raises ValueError for one that another request made."""
    missing = []
    for index, path in enumerate(row.paths):
        if not path.exists():
            missing.append(index)
            continue
        try:
            there = Request.from_recipe(read_recipe(path))[0]
        except ValueError:
            continue  # without its recipe (--no-metadata) an image is taken for what it is named
        if there != row.request:
            raise ValueError(f"{path} was made by another request; remove it, or choose another folder")
    return missing
