"""The commands train, verify, data draw and data check."""

from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, Seed, answer, progress, say, waiting


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/flux-canny.toml.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME].", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model or an adapter with a recipe."""
    if not recipe.is_file():
        raise typer.BadParameter(f"no recipe at {recipe}")
    folder = out or Path("runs") / recipe.stem
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(
            f"{folder} already holds a run; add --resume to continue it, or choose another folder with -o"
        )
    from condit.training.run import train as run

    run(recipe, out=folder, resume=resume)
    typer.echo(str(folder))


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
    from condit.verify import fixtures
    from condit.verify.files import BACKBONES

    systems = fixtures.SYSTEMS
    if system not in (*systems, "all"):
        raise typer.BadParameter(f"expected one of {', '.join(systems)} or all; found {system!r}")
    if file is not None and system not in BACKBONES:
        raise typer.BadParameter(f"FILE is supported for {', '.join(BACKBONES)}; found {system}")
    if file is not None and (golden or into):
        raise typer.BadParameter("--golden and --into apply to the recorded tensors; leave them out, or leave FILE out")
    if file is None and heads is not None:
        raise typer.BadParameter("--heads needs a FILE")
    if into is not None and system != "all":
        raise typer.BadParameter(f"--into needs the table of all systems; found {system!r}")
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

    from condit.verify.files import verify_file as run
    from condit.verify.fixtures import SYSTEMS, lines
    from condit.verify.fixtures import as_json as row_as_json

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


def generate_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the data set.", show_default=False)],
    subjects: Annotated[Path, typer.Option("--subjects", help="File of subjects, one per line.", show_default=False)],
    styles: Annotated[Path, typer.Option("--styles", help="File of styles, one per line.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `condit models`, a folder or a file.")
    ] = "tiny",
    per_subject: Annotated[int, typer.Option("--per-subject", help="Styles for each subject.")] = 14,
    images: Annotated[int, typer.Option("--images", "-n", help="Images for each prompt.")] = 4,
    template: Annotated[str, typer.Option(help="Template of the prompts.")] = "{subject}, {style}",
    negative: Annotated[str | None, typer.Option("--negative", help="The negative prompt.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text [default: the model's].")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps [default: cpu for embedded models].")] = None,
    debug: Debug = False,
) -> None:
    """Generate a data set of image pairs.

    Every subject is generated in a number of styles, with more than one image per prompt. Images of a prompt share
    their style, images of a subject their content. DEADiff and IP-Adapter train on such pairs.
    An interrupted run continues where it stopped.
    """
    from condit.data.prompt_table import draw_groups, prompt_table, read_words

    for file in (subjects, styles):
        if not file.is_file():
            raise typer.BadParameter(f"no file {file}")
    rows = prompt_table(read_words(subjects), read_words(styles), per_subject=per_subject, template=template, seed=seed)
    from condit.cli.request import Request, Studio

    with waiting(f"loading {model}"):
        studio = Studio(model, device)

    def generate(prompt: str, first: int, count: int):
        return studio.generate(Request(prompt, model, (), negative, first, count, steps, guidance)).images

    with progress("generating") as advance:
        draw_groups(out, rows, generate, images=images, seed=seed, progress=advance)
    typer.echo(str(out))


def check_data(
    source: Annotated[Path, typer.Argument(help="A folder with metadata.jsonl, a .tar, or a folder of tars.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Check names and captions only, without decoding images.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check image pairs before training on them.

    Prints every row that cannot be read, and exits with status 1 if there is one.
    """
    from condit.data.pairs import check

    report = check(source, decode=not quick)
    if as_json:
        fields = {"pairs": report.pairs, "roles": report.roles, "groups": report.groups, "problems": report.problems}
        answer(fields)
    else:
        roles = ", ".join(f"{role} {count}" for role, count in report.roles.items()) or "none"
        groups = ", ".join(f"{kind} {count}" for kind, count in report.groups.items())
        typer.echo(f"{report.pairs} pairs; with references: {roles}{f'; groups: {groups}' if groups else ''}")
        for problem in report.problems:
            say(problem)
    if report.problems:
        raise typer.Exit(1)
