"""`condit generate --from ROWS.jsonl`: a request in each row, as a job; and the model that draws it in a worker."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from condit.cli.options import JobOptions, ModelOptions, OutputOptions, ReferenceOptions, SamplingOptions, StartOptions
from condit.cli.outputs import name_of
from condit.cli.reference import images_of, read_references
from condit.cli.terminal import answer, say, waiting
from condit.data.files import parse_json, read_bounded
from condit.data.images import MAX_BYTES, load_image, read_recipe, save_image
from condit.jobs.local import rank_of
from condit.jobs.plan import Drawer, Job, Place, Row, Save, Stopped, content_key
from condit.jobs.run import Outcome, engine_of, run

if TYPE_CHECKING:
    from condit.cli.request import Request, Studio

REFERENCES = tuple(name for name in ReferenceOptions.__dataclass_fields__ if name != "strength")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FIELDS = ("prompt", *SamplingOptions.__dataclass_fields__, *StartOptions.__dataclass_fields__)


@dataclass(frozen=True)
class StudioOpener:
    """Opens the model of a job in a worker. A row's work is the fields of a request over `common`."""

    model: ModelOptions
    common: Mapping[str, object] = field(default_factory=dict)
    with_recipe: bool = True

    def __call__(self, place: Place) -> Drawer:
        import torch

        from condit.cli.request import Studio

        model, device = self.model, self.model.device
        if device == "cuda" and torch.cuda.device_count() > 1:
            device = f"cuda:{place.local_rank % torch.cuda.device_count()}"
        with waiting(f"loading {model.model}"):
            studio = Studio(model.model, device, offload=model.offload, quantize=model.quantize)
        return Drawer(partial(self.draw, studio), {"hash": studio.pipe.parts.hash})

    def draw(self, studio: Studio, work: Mapping[str, object]) -> list[Save]:
        """The images of a row, in one batch of their own."""
        request = request_of({**self.common, **work})
        for path in (*images_of(request.references), *(p for p in (request.image, request.mask) if p)):
            load_image(path)
        made = studio.generate(request)
        if not self.with_recipe:
            return [partial(save_image, image) for image in made.images]
        parts = zip(made.images, made.recipes, made.parameters, strict=True)
        return [partial(save_image, image, recipe=recipe, parameters=text) for image, recipe, text in parts]


class ClassOpener(StudioOpener):
    """The same for the rows of `rulers.samples`; `common` are the settings of all."""

    def draw(self, studio: Studio, work: Mapping[str, object]) -> list[Save]:
        from condit.rulers.samples import sample

        return [sample(studio.pipe, work, **self.common)]  # type: ignore[arg-type]


def run_job(job: Job, model: ModelOptions, options: JobOptions) -> Outcome:
    """Runs a job with the options of a command. Exits with 1 if it stopped before its end."""
    rank = rank_of(os.environ)
    engine = engine_of(options.engine, options.workers, rank, gpu=False if model.device == "cpu" else None)
    try:
        outcome = run(job, engine, rank=rank, max_errors=options.max_errors, tell=say)
    except KeyboardInterrupt:
        say("the images so far are saved; the same command continues")
        raise
    except Stopped as stop:
        say(f"error: {stop}. The images so far are saved; the same command continues")
        raise typer.Exit(1) from None
    if rank.world > 1:
        say(f"rank {rank.number} of {rank.world} drew its {outcome.rows} of {len(job.rows)} rows")
    return outcome


def generate_rows(
    file: Path, folder: Path, common: Mapping[str, Any], model: ModelOptions, output: OutputOptions, options: JobOptions
) -> None:
    """Generates what is missing of the rows of `file` in `folder`. Names each row that fails, makes the others, and
    exits with 1 if there was one."""
    if folder.suffix and not folder.is_dir():
        raise typer.BadParameter(f"-o {folder}: --from needs a folder")
    rows, errors = read_rows(file, folder, common)
    opener = StudioOpener(model, with_recipe=not output.no_metadata)
    job = Job(folder, tuple(rows), opener, errors, {"model": model.model}, options.threads)
    outcome = run_job(job, model, options)
    if output.as_json:
        problems = [f"{name}: {error}" for name, error in outcome.errors.items()]
        answer({"folder": str(folder), "made": [str(folder / name) for name in outcome.made], "problems": problems})
    else:
        say(f"{len(outcome.made)} images made, {outcome.files - len(outcome.made)} were there or are broken")
        typer.echo(str(folder))
    if outcome.errors:
        raise typer.Exit(1)


def read_rows(file: Path, folder: Path, common: Mapping[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """The rows of a JSON Lines file over the options of the command line, and by name what is wrong with the others.
    Keys are the names of options; `name` is that of the image's file, without it the words of the prompt and the hash
    of the request."""
    rows, errors, names = [], {}, {}
    try:
        text = read_bounded(file, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name = f"{file.name}:{number}"
        try:
            row = read_row(line, name, folder, common)
            if other := {names[path] for path in row.files if path in names}:
                raise ValueError(f"{row.files[0]} is the name of {min(other)} too. Give the row a name or another seed")
            names |= dict.fromkeys(row.files, name)
            rows.append(row)
        except ValueError as error:
            errors[name] = str(error)
    return rows, errors


def read_row(line: str, number: str, folder: Path, common: Mapping[str, Any]) -> Row:
    """A row. Raises ValueError for what it cannot hold, and for an image of its name that another request made."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise ValueError(f"this is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError('expected an object, as in {"prompt": "a red apple", "seed": 3}')
    fields = {key.replace("-", "_"): value for key, value in fields.items()}
    name = fields.pop("name", None)
    if name is not None and (not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..")):
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
    request = request_of({**common, **fields, **own})
    # The command has every setting that differs from its default, so a later condit gives the same name.
    path = Path(name or f"{name_of(request.prompt)}-{content_key(request.command(''))}")
    path = path if path.suffix.lower() in SUFFIXES else Path(f"{path}.png")
    ends = [""] if request.count == 1 else [f"-{index}" for index in range(request.count)]
    files = tuple(path.with_stem(f"{path.stem}{end}").name for end in ends)
    if name is not None:
        refuse_others(request, [folder / file for file in files])
    lines = tuple({"text": request.prompt, "seed": request.seed + index} for index in range(request.count))
    return Row(number, files, asdict(request), lines)


def request_of(fields: Mapping[str, object]) -> Request:
    """A request by its fields. Raises ValueError."""
    from pydantic import TypeAdapter, ValidationError

    from condit.cli.request import Request
    from condit.training.fields import first_error

    try:
        return TypeAdapter(Request).validate_python(fields)
    except ValidationError as error:
        raise ValueError(first_error(error).lstrip(": ")) from None


def refuse_others(request: Request, paths: Sequence[Path]) -> None:
    """Raises ValueError for an image that another request made: its name does not say what it holds."""
    for path in paths:
        if path.exists():
            try:
                there = type(request).from_recipe(read_recipe(path))[0]
            except ValueError:
                continue  # without its recipe (--no-metadata) an image is taken for what it is named
            if there != request:
                raise ValueError(f"{path} was made by another request; remove it, or choose another folder")
