"""Output of commands (paths and JSON go to stdout, everything else to stderr), and options that they share."""

import contextlib
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show details and tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _seed(seed: int) -> int:
    """-1 is a random seed, as in A1111. The image's recipe and name hold the one that was taken."""
    if not -1 <= seed < 2**62:
        raise typer.BadParameter(f"expected a seed from 0 to {2**62 - 1}, or -1 for a random one; found {seed}")
    return secrets.randbelow(2**31) if seed == -1 else seed


Seed = Annotated[
    int, typer.Option("--seed", help="Seed of the noise; image i uses seed + i. -1: a random one.", callback=_seed)
]


# Control characters but tab and newline; marks that reverse the direction of text; halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from files of strangers, as it can be shown: codes that act on a terminal are escaped."""
    return _UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


class PrintableFormatter(logging.Formatter):
    """For log lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def say(text: str) -> None:
    """Prints a message for people to stderr."""
    typer.echo(printable(text), err=True)


def answer(value: object) -> None:
    """Prints JSON for programs to stdout."""
    typer.echo(printable(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


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
