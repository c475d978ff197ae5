"""Output of commands (paths and JSON go to stdout, everything else to stderr), and options that they share."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show details and tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the noise; image i uses seed + i.")]


def say(text: str) -> None:
    """Prints a message for people to stderr."""
    typer.echo(text, err=True)


def answer(value: object) -> None:
    """Prints JSON for programs to stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows a spinner on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function (done, total) that moves a progress bar on a terminal and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def output_folder() -> Path:
    return Path(os.environ.get("CONDIT_OUTPUT_DIR") or "condit-out")
