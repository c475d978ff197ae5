"""The laboratory's commands beside those of `condit`: `condit evaluate`, `condit data icons`."""

import typer

from condit_lab.commands import evaluate
from condit_lab.commands.data import icons


def register(app: typer.Typer, data_app: typer.Typer) -> None:
    """Entry point of `condit.commands`."""
    app.add_typer(evaluate.app, name="evaluate")
    data_app.command()(icons)
