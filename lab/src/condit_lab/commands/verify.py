"""`condit verify`: systems against recorded tensors of their official code, weight files against another library."""

from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, answer, say, waiting


def verify(
    system: Annotated[
        str,
        typer.Argument(
            help="vit, dit, diffit, omini, ip-adapter, instantstyle, deadiff, dit4edit or all.",
            show_default=False,
        ),
    ],
    file: Annotated[
        str | None,
        typer.Argument(help="Weights to load: a file, a folder, or the name of a model.", show_default=False),
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Folder of the fixtures [default: the checkout's].")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Number of attention heads, if FILE does not record it.")] = None,
    into: Annotated[
        Path | None, typer.Option("--into", help="Page to write the table into, such as docs/parity.md.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a system with its reference implementation.

    Compares with recorded tensors of the official code, or a weight FILE of vit, dit or diffit with another library.
    """
    from condit_lab.parity import fixtures
    from condit_lab.parity.files import BACKBONES

    systems = fixtures.SYSTEMS
    if system not in (*systems, "all"):
        raise typer.BadParameter(f"The system must be one of {', '.join(systems)} or all; found {system!r}.")
    if file is not None and system not in BACKBONES:
        raise typer.BadParameter(f"FILE is supported for {', '.join(BACKBONES)} only; found {system}.")
    if file is not None and (golden or into):
        raise typer.BadParameter(
            "--golden and --into apply to the recorded tensors. Leave them out, or leave FILE out."
        )
    if file is None and heads is not None:
        raise typer.BadParameter("--heads applies to a FILE. Give one, or leave --heads out.")
    if into is not None and system != "all":
        raise typer.BadParameter(f"--into writes the table of all systems. Use it with all; found {system!r}.")
    if file is not None:
        verify_file(system, file, heads, as_json=as_json)
        return
    folder = fixtures.find_golden(golden)
    chosen = list(systems) if system == "all" else [system]
    with waiting("comparing"):
        rows = {name: fixtures.verify_fixtures(name, folder) for name in chosen}
    if as_json:
        answer({name: [fixtures.as_json(row) for row in checked] for name, checked in rows.items()})
    else:
        for line in fixtures.lines([(systems[name].title, row) for name, checked in rows.items() for row in checked]):
            typer.echo(line)
    if into is not None:
        fixtures.write_between_marks(into, fixtures.markdown(rows))
        say(f"written into {into}")
    if not all(row.ok for checked in rows.values() for row in checked):
        raise typer.Exit(1)


def verify_file(backbone: str, source: str, heads: int | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from condit_lab.parity.files import verify_file as run
    from condit_lab.parity.fixtures import SYSTEMS, lines
    from condit_lab.parity.fixtures import as_json as row_as_json

    with waiting(f"reading {source}"):
        report = run(backbone, source, heads=heads)
    rows = report.reference.rows
    if as_json:
        reference = {"note": report.reference.note, "rows": [row_as_json(row) for row in rows]}
        answer({"model": backbone, **asdict(report), "reference": reference})
    else:
        for name, text in report.described().items():
            typer.echo(f"{name:<10}  {text}")
        for line in lines([(SYSTEMS[backbone].title, row) for row in rows]) if rows else ():
            typer.echo(line)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
