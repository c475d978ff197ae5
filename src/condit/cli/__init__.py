"""The command line.

This module imports nothing heavy, so that `condit --help` answers before torch could be loaded."""

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer

from condit import __version__
from condit.cli import evaluate, generate, pairs, study
from condit.cli.compare import compare
from condit.cli.edit import edit
from condit.cli.memory import keep_memory
from condit.cli.options import Grouped
from condit.cli.serve import serve, study_app
from condit.cli.terminal import Debug, Json, PrintableFormatter, answer, output_folder, say

app = typer.Typer(
    help="Controllable image generation from prompts and references.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than the rest of the command
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
data_app = typer.Typer(help="Make and check training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(study_app, name="study")
for command in (
    generate.demo,
    generate.generate,
    compare,
    edit,
    generate.replay,
    generate.recipe,
    generate.annotate,
    generate.plan,
    study.train,
    study.convert,
    serve,
):
    app.command(cls=Grouped)(command)
data_app.command("draw", cls=Grouped)(study.generate_data)
data_app.command("pair", cls=Grouped)(pairs.pair)
data_app.command("filter", cls=Grouped)(pairs.filter_pairs)
data_app.command("check")(study.check_data)
# Other installed packages can add commands, as the laboratory of a checkout does.
for added in entry_points(group="condit.commands"):
    added.load()(app, data_app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with 0 (success), 1 (failure), 2 (wrong usage) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[lines], level=logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("condit").setLevel(logging.DEBUG if debug else logging.INFO)
    for library in ("PIL", "urllib3", "matplotlib", "asyncio", "fontTools"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Hides the libraries' own messages, unless the user has set these variables.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers shows one for each part of a model
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may not be text
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(arguments, prog_name="condit")
    except SystemExit as end:
        if end.code == 130:  # typer's code after KeyboardInterrupt
            say("interrupted")
        raise
    except Exception as error:
        if debug:
            raise
        say(f"error: {explain(error)}")
        sys.exit(1)
    sys.exit(0)


def explain(error: Exception) -> str:
    """One line of text. Errors that condit does not expect include their type."""
    return " ".join(line.strip() for line in _text_of(error).splitlines())


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ValueError | OSError | KeyError) and text:
        return text
    if isinstance(error, ImportError):
        return f"{text}. Is an extra missing? `condit doctor` lists them"
    return f"{type(error).__name__}: {text} (run again with --debug to see where)"


def _version(show: bool) -> None:
    if show:
        typer.echo(f"condit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    pass


@app.command()
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the embedded models and adapters."""
    from dataclasses import asdict, is_dataclass

    from condit.weights.catalog import MODELS

    if as_json:
        answer(
            {
                name: asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry
                for name, entry in MODELS.items()
            }
        )
        return
    rows = [(name, e.kind, f"{e.size_mb:g} MB", e.licence, e.summary) for name, e in MODELS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        typer.echo("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip())


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check the installation: versions, device, folders and models."""
    from condit.cli.diagnosis import check

    findings = check(output_folder())
    if as_json:
        answer([{"state": finding.state, "what": finding.what, "text": finding.text} for finding in findings])
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.state:<4}  {finding.what:<{width}}  {finding.text}")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)
