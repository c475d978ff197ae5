"""`condit bench`: benchmarks that draw with every embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, Seed, say
from condit_lab.commands.evaluate import Data, Out, folder, names, show

app = typer.Typer(help="Benchmarks of methods on the embedded models.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Benchmarks of methods on the embedded models."""


@app.command()
def style(
    out: Out = None,
    data: Data = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures of each method at each strength.")] = 48,
    references: Annotated[int, typer.Option("--references", help="Styles of the icon world, a reference each.")] = 8,
    own: Annotated[
        Path | None, typer.Option("--own", help="Folder of your references; their names say what they show.")
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Separated by commas [default: all].")] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option("--strengths", help='"0.3,1" for every method, "plain=0.3,1" for one; repeatable.'),
    ] = None,
    sites: Annotated[
        str | None, typer.Option("--sites", help="Layers of the style block [default: by the block probe].")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the sampler.")] = 20,
    bf16: Annotated[bool, typer.Option("--bf16", help="Draw in bfloat16: faster where the CPU knows it.")] = False,
    adain: Annotated[Path | None, typer.Option("--adain", help="Folder of AdaIN's weights, for that baseline.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also measure with every ruler of condit evaluate folder.")
    ] = False,
    table: Annotated[Path | None, typer.Option("--table", help="Page to write the table into.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Every method of style transfer on every embedded model: one table, one picture."""
    from condit_lab.suites.bench import bench_style, write_table
    from condit_lab.suites.style import Protocol

    asked = Protocol(count, seed, names(methods), tuple(strengths or ()), "combo", names(sites) or (), steps, bf16)
    result = bench_style(
        folder(out), asked, references=references, own=own, data=data, adain=adain, report=report, tell=say
    )
    if table is not None:
        write_table(result, table)
        say(f"written into {table}")
    show(result, folder(out), as_json)
