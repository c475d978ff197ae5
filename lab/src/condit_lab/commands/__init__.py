"""Commands of the laboratory in `condit --help`: `condit evaluate`, `bench`, `verify`, `data icons`."""

import typer

from condit.cli.evaluate import app as evaluate_group
from condit_lab.commands import bench, evaluate
from condit_lab.commands.data import icons
from condit_lab.commands.verify import verify


def register(app: typer.Typer, data_app: typer.Typer) -> None:
    """Entry point of `condit.commands`."""
    for measured in (evaluate.tiny, evaluate.style, evaluate.edit, evaluate.classes):
        evaluate_group.command()(measured)
    app.add_typer(bench.app, name="bench")
    app.command()(verify)
    data_app.command()(icons)
