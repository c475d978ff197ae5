"""The command line: one verb a job. Paths and JSON go to stdout, everything else to stderr.

Nothing heavy is imported up here: `condit --help` answers before torch would have started to load."""

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from condit import __version__
from condit.memory import keep_memory

app = typer.Typer(
    help="Controllable image generation: a prompt and a reference become a picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich costs more than the whole answer
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
data_app = typer.Typer(help="Make the data that models are trained on.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Debug = Annotated[bool, typer.Option("--debug", help="Show details and tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Start of the noise; image i uses seed + i.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("condit").setLevel(logging.DEBUG if debug else logging.INFO)
    for library in ("PIL", "urllib3", "matplotlib", "asyncio", "fontTools"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # The first thing a user sees must be ours; whoever set these keeps them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers draws one for each part it loads
    keep_memory()
    try:
        app(arguments, prog_name="condit")
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        say(f"error: {explain(error)}")
        sys.exit(1)
    sys.exit(0)


def explain(error: Exception) -> str:
    """One line for people: our own errors say it all; one that we did not foresee gives its type as well."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ValueError | OSError | KeyError) and text:
        return text
    if isinstance(error, ImportError):
        return f"{text}. Is an extra missing? `condit doctor` lists them"
    return f"{type(error).__name__}: {text} (run again with --debug to see where)"


def say(text: str) -> None:
    """To people: stderr."""
    typer.echo(text, err=True)


def answer(value: object) -> None:
    """To programs: JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A moving sign on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, all) that moves a bar on a terminal and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def output_folder() -> Path:
    return Path(os.environ.get("CONDIT_OUTPUT_DIR") or "condit-out")


def _version(asked: bool) -> None:
    if asked:
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
def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the grid and its references.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a labelled grid of what tiny can do.

    Every picture comes with the command that draws it again.
    """
    from condit.demo import draw_demo

    result = draw_demo(out or output_folder(), seed=seed, tell=say)
    if as_json:
        answer(result)
    else:
        typer.echo(result["grid"])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in English or Chinese.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A name of `condit models`.")] = "tiny",
    style: Annotated[
        list[str] | None, typer.Option("--style", metavar="REF[:S]", help="Draw in the style of this picture.")
    ] = None,
    subject: Annotated[
        list[str] | None, typer.Option("--subject", metavar="REF[:S]", help="Draw the subject of this picture.")
    ] = None,
    edges: Annotated[
        list[str] | None, typer.Option("--edges", metavar="IMG[:S]", help="Follow the edges found in this picture.")
    ] = None,
    edges_map: Annotated[
        list[str] | None, typer.Option("--edges-map", metavar="MAP[:S]", help="Follow this ready edge map.")
    ] = None,
    gray: Annotated[
        list[str] | None,
        typer.Option("--gray", metavar="IMG[:S]", help="Colour this picture; its own colours are dropped."),
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option("--control", metavar="ADAPTER=REF[:S]", help="Any adapter by its full name.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Strength S of references that name none.")] = 1.0,
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep away from.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text [default: the model's].")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="Guidance by the references, apart from the text [default: none].")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps [default: cpu for tiny].")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .png, .jpg or .webp, or a folder.", show_default=False)
    ] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Leave the recipe out of the PNG.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a prompt, with references if you like.

    In the style of a picture, with its subject, along its edges, or all of it.
    A reference may carry its own strength: --style ref.png:0.6
    """
    from condit.data.images import load_image
    from condit.request import Reference, Request

    asked = {"style": style, "subject": subject, "edges": edges, "gray": gray}
    references = [
        Reference(use, *parse_reference(value, strength)) for use, values in asked.items() for value in values or ()
    ]
    references += [Reference("edges", *parse_reference(value, strength), ready=True) for value in edges_map or ()]
    for value in control or ():
        adapter, equals, reference = value.partition("=")
        if not equals or not adapter or not reference:
            raise typer.BadParameter(f"--control takes ADAPTER=REF[:S], as in tiny/style=ref.png; found {value!r}")
        references.append(Reference(adapter, *parse_reference(reference, strength)))
    try:
        request = Request(prompt, model, tuple(references), negative, seed, count, steps, guidance, image_guidance)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    paths = output_paths(request.prompt, out, seed, count, no_metadata)
    for reference in request.references:  # a wrong picture is told before seconds are spent on loading the model
        load_image(reference.path)
    draw_and_save(request, paths, range(count), with_recipe=not no_metadata, as_json=as_json, device=device)


def parse_reference(value: str, strength: float) -> tuple[str, float]:
    """'ref.png:0.6' -> path and strength. A file that is really called so wins."""
    path, colon, tail = value.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", tail) and not Path(value).exists():
        return path, float(tail)
    return value, strength


def output_paths(prompt: str, out: Path | None, seed: int, count: int, no_metadata: bool = False) -> list[Path]:
    """Where the pictures go: -o itself, with the seed before its ending if there are several, or names in a folder."""
    if out is None or out.is_dir() or not out.suffix:
        words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:40].strip("-") or "image"
        return [(out or output_folder()) / f"{words}-{seed + index}.png" for index in range(count)]
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise typer.BadParameter(f"-o {out}: end it in .png, .jpg or .webp, or name a folder")
    if out.suffix.lower() != ".png" and not no_metadata:
        raise typer.BadParameter(f"-o {out}: only a PNG carries its recipe; use .png, or add --no-metadata")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed + index}") for index in range(count)]


def draw_and_save(
    request,
    paths: Sequence[Path],
    indices: Sequence[int],
    *,
    with_recipe: bool,
    as_json: bool,
    device: str | None = None,
):
    """Draws the request and writes the pictures of `indices` to `paths`. Returns the recipes of all its pictures."""
    from condit.data.images import save_image
    from condit.request import Studio

    start = time.perf_counter()
    with waiting(f"loading {request.model}"):
        studio = Studio(request.model, device)
    with waiting("drawing"):
        drawing = studio.draw(request)
    for path, index in zip(paths, indices, strict=True):
        metadata = {"recipe": drawing.recipes[index], "parameters": drawing.parameters[index]} if with_recipe else {}
        save_image(drawing.images[index], path, **metadata)
    seconds = round(time.perf_counter() - start, 2)
    if as_json:
        images = [{"path": str(path), "seed": request.seed + i} for path, i in zip(paths, indices, strict=True)]
        answer({"images": images, "seconds": seconds, "recipe": drawing.recipes[0]})
    else:
        say(f"drawn in {seconds} s")
        for path in paths:
            typer.echo(str(path))
    return drawing.recipes


@app.command()
def replay(
    image: Annotated[Path, typer.Argument(help="A PNG drawn by condit.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it [default: beside it, with -replay].")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a PNG again from the recipe inside it.

    Says whether it came out the same, and what has changed since.
    """
    from condit.data.images import load_image, read_recipe
    from condit.request import Request, differences, locate

    recipe = read_recipe(image)
    request, index = Request.from_recipe(recipe)
    request = locate(request, image.parent)
    before = load_image(image)
    target = out or image.with_stem(f"{image.stem}-replay")
    recipes = draw_and_save(request, [target], [index], with_recipe=target.suffix.lower() == ".png", as_json=as_json)
    for difference in differences(recipe, recipes[index]):
        say(f"warning: {difference}")
    say(
        "the same picture"
        if before.tobytes() == load_image(target).tobytes()
        else "another picture than the one in the file"
    )


@app.command()
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


@app.command()
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="tiny, or exported class models to compare.", show_default="tiny")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the page.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="An icon world made by `condit data icons`.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures a measure.")] = 512,
    quick: Annotated[bool, typer.Option("--quick", help="64 pictures a measure, to see that it works.")] = False,
    sets: Annotated[str | None, typer.Option("--sets", help="Sets to draw, separated by commas.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Draw in bfloat16: faster where the CPU knows it.")] = False,
    vae: Annotated[str, typer.Option("--vae", help="The autoencoder that class models were trained on.")] = "tiny",
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure models on held-out pictures."""
    folder = out or output_folder() / "evaluation"
    if models and models != ["tiny"]:
        if data is None or sets or bf16:
            raise typer.BadParameter(
                "class models are compared on a world of icons (--data), without --sets and --bf16"
            )
        from condit.evaluation.classes import evaluate_classes

        found = evaluate_classes(models, folder, data=data, vae=vae, count=64 if quick else count, seed=seed)
        answer(found) if as_json else typer.echo(str(folder))
        return
    from condit.evaluation.tiny import evaluate as run

    chosen = None if sets is None else [name.strip() for name in sets.split(",")]
    result = run(out=folder, data=data, count=count, seed=seed, quick=quick, sets=chosen, bf16=bf16)
    if as_json:
        answer(result)
    else:
        typer.echo(str(folder))


@app.command()
def verify(
    backbone: Annotated[str, typer.Argument(help="vit, dit, diffit, or all of them.", show_default=False)],
    file: Annotated[
        str | None, typer.Argument(help="Weights to load: a file, a folder or a published name.", show_default=False)
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
    from condit.evaluation.verify import fixtures

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

    from condit.evaluation.verify.files import verify_file as run
    from condit.evaluation.verify.fixtures import TITLES, lines
    from condit.evaluation.verify.fixtures import as_json as row_as_json

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


@data_app.command()
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
    from condit.data.icons_build import build

    with progress("rasterising") as advance:
        build(out, ui=ui, packages=packages, progress=advance)
    typer.echo(str(out))


@app.command()
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the known models and adapters."""
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
    """Check versions, device, folders and models."""
    from condit.doctor import check

    findings = check(output_folder())
    if as_json:
        answer([{"state": finding.state, "what": finding.what, "text": finding.text} for finding in findings])
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.state:<4}  {finding.what:<{width}}  {finding.text}")
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
