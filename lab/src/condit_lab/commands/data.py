"""`condit data icons`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug


def icons(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the icon world.", show_default=False)],
    ui: Annotated[bool, typer.Option("--ui", help="The sets of UI icons as well.")] = False,
    packages: Annotated[
        Path | None, typer.Option("--packages", help="Folder of packages fetched before.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Build the icon world from pinned packages.

    About 20,000 pictures with concept, style, split and licence. Fetches with npm what --packages does not hold.
    """
    from condit_lab.icons.build import build
    from condit_lab.world.progress import Reporter

    with Reporter() as report:
        build(out, ui=ui, packages=packages, progress=partial(report, "rasterising"))
    typer.echo(str(out))
