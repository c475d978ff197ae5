"""Commands that train, verify and make data: train, verify, data draw, data check."""

from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, Seed, answer, progress, say, waiting


def train(
    recipe: Annotated[Path, typer.Argument(help="A file of recipes/*.toml.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME].", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model or an adapter as its recipe says."""
    if not recipe.is_file():
        raise typer.BadParameter(f"no recipe at {recipe}")
    folder = out or Path("runs") / recipe.stem
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(
            f"{folder} holds a run already; add --resume to go on, or choose another folder with -o"
        )
    from condit.training.run import train as run

    run(recipe, out=folder, resume=resume)
    typer.echo(str(folder))


def verify(
    backbone: Annotated[str, typer.Argument(help="vit, dit, diffit, or all of them.", show_default=False)],
    file: Annotated[
        str | None,
        typer.Argument(help="Weights to load: a file, a folder, or the name of a model.", show_default=False),
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Folder of the fixtures [default: those of the checkout].")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of a FILE that does not tell them.")] = None,
    into: Annotated[
        Path | None, typer.Option("--into", help="Page to write the table into, as docs/parity.md.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how exactly a backbone follows its reference.

    On the recorded tensors of the official code; or, of a weight FILE, against transformers or diffusers.
    """
    if backbone not in ("vit", "dit", "diffit", "all"):
        raise typer.BadParameter(f"there are vit, dit, diffit and all; found {backbone!r}")
    if file is not None and backbone == "all":
        raise typer.BadParameter("a FILE holds one backbone; name it instead of all")
    if file is not None and (golden or into):
        raise typer.BadParameter("--golden and --into are for the recorded tensors; leave them out, or leave FILE out")
    if file is None and heads is not None:
        raise typer.BadParameter("--heads is for a FILE")
    if into is not None and backbone != "all":
        raise typer.BadParameter(f"--into takes the table of all backbones; found {backbone!r}")
    if file is not None:
        verify_file(backbone, file, heads, as_json=as_json)
        return
    from condit.verify import fixtures

    folder = fixtures.find_golden(golden)
    with waiting("comparing"):
        chosen = list(fixtures.CHECKS) if backbone == "all" else [backbone]
        rows = {name: fixtures.verify_fixtures(name, folder) for name in chosen}
    if as_json:
        answer({name: [fixtures.as_json(row) for row in checked] for name, checked in rows.items()})
    else:
        for line in fixtures.lines([(fixtures.TITLES[name], row) for name, checked in rows.items() for row in checked]):
            typer.echo(line)
    if into is not None:
        fixtures.write_between_marks(into, fixtures.markdown(rows))
        say(f"written into {into}")
    if not all(row.ok for checked in rows.values() for row in checked):
        raise typer.Exit(1)


def verify_file(backbone: str, source: str, heads: int | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from condit.verify.files import verify_file as run
    from condit.verify.fixtures import TITLES, lines
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
        for line in lines([(TITLES[backbone], row) for row in rows]) if rows else ():
            typer.echo(line)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


def draw_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the set.", show_default=False)],
    subjects: Annotated[Path, typer.Option("--subjects", help="Subjects, one a line.", show_default=False)],
    styles: Annotated[Path, typer.Option("--styles", help="Styles, one a line.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A name, a folder or a file of a model.")] = "tiny",
    per_subject: Annotated[int, typer.Option("--per-subject", help="Styles of each subject.")] = 14,
    images: Annotated[int, typer.Option("--images", "-n", help="Pictures of each prompt.")] = 4,
    template: Annotated[str, typer.Option(help="How a prompt is made.")] = "{subject}, {style}",
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep away from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text [default: the model's].")] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps [default: cpu for tiny].")] = None,
    debug: Debug = False,
) -> None:
    """Draw a paired set: every subject in some styles, several pictures a prompt.

    Pictures of a prompt share their style, those of a subject their content: what DEADiff and IP-Adapter train on.
    A run that was stopped goes on.
    """
    from condit.data.prompt_table import draw_groups, prompt_table, read_words

    for file in (subjects, styles):
        if not file.is_file():
            raise typer.BadParameter(f"no list at {file}")
    rows = prompt_table(read_words(subjects), read_words(styles), per_subject=per_subject, template=template, seed=seed)
    from condit.cli.request import Request, Studio

    with waiting(f"loading {model}"):
        studio = Studio(model, device)

    def generate(prompt: str, first: int, count: int):
        asked = Request(prompt, model, (), negative, first, count, steps, guidance)
        return studio.draw(asked).images

    with progress("drawing") as advance:
        draw_groups(out, rows, generate, images=images, seed=seed, progress=advance)
    typer.echo(str(out))


def check_data(
    source: Annotated[Path, typer.Argument(help="A folder with metadata.jsonl, a .tar, or a folder of tars.")],
    quick: Annotated[bool, typer.Option("--quick", help="Names and captions only; no picture is decoded.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check pairs of pictures before training on them.

    Quotes every row that cannot be read; exit status 1 if there is one.
    """
    from condit.data.pairs import check

    report = check(source, decode=not quick)
    if as_json:
        told = {"pairs": report.pairs, "roles": report.roles, "groups": report.groups, "problems": report.problems}
        answer(told)
    else:
        roles = ", ".join(f"{role} {count}" for role, count in report.roles.items()) or "none"
        groups = ", ".join(f"{kind} {count}" for kind, count in report.groups.items())
        typer.echo(f"{report.pairs} pairs; with references: {roles}{f'; groups: {groups}' if groups else ''}")
        for problem in report.problems:
            say(problem)
    if report.problems:
        raise typer.Exit(1)
