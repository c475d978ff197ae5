"""Output of commands (paths and JSON go to stdout, everything else to stderr), and options that they share."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
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
    """Shows a text on a terminal while it waits, nothing elsewhere."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def output_folder() -> Path:
    return Path(os.environ.get("CONDIT_OUTPUT_DIR") or "condit-out")
