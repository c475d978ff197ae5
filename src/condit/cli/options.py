"""Options of the command line as values: a parameter of a command that is a dataclass stands for one option a field."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from condit.cli.terminal import Seed

Model = Annotated[str, typer.Option("--model", "-m", help="A model of `condit models`, a folder or a file.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="A .png, .jpg or .webp file, or a folder.", show_default=False)
]


@dataclass(frozen=True)
class Sampling:
    """Options of every command that samples images."""

    negative: Annotated[str | None, typer.Option("--negative", help="The negative prompt.")] = None
    seed: Seed = 0
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text [default: the model's].")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps [default: cpu for embedded models].")] = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, which has the fields of its dataclass parameters as options of its own, in their place."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        group = groups.get(name)
        shown = [parameter] if group is None else list(inspect.signature(group).parameters.values())
        types = hints if group is None else get_type_hints(group, include_extras=True)
        parameters += [p.replace(annotation=types[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]

    @functools.wraps(command)
    def run(**values: object) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return run
