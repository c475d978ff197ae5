"""The command serve, and the commands of preference studies."""

from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, Seed, answer, say

study_app = typer.Typer(
    help="Compare methods by preferences of blind raters.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def serve(
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model; repeat for more [default: tiny].")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; another than the loopback needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 8188,
    token: Annotated[
        str | None, typer.Option(envvar="CONDIT_TOKEN", help="The token that clients send as their API key.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Another name of this server, as behind a proxy.")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="Also serve this preference study, at /study.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps [default: cpu for embedded models].")] = None,
    queue: Annotated[int, typer.Option(help="Most images that may wait.", min=1)] = 64,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    debug: Debug = False,
) -> None:
    """Serve a web page and an HTTP API, like OpenAI's for images. Needs the extra: pip install 'condit[serve]'."""
    from condit.serve.limits import Limits
    from condit.serve.run import ServeOptions
    from condit.serve.run import serve as run

    hosts, models = allow_host or (), model or ["tiny"]
    try:
        options = ServeOptions(models, host, port, token, hosts, study, device, log_prompts, Limits(waiting=queue))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    run(options, say)


@study_app.command("make")
def make(
    out: Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)],
    methods: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD=FOLDER...",
            help="Pictures of each method, or METHOD=ADAPTER to generate them.",
            show_default=False,
        ),
    ],
    references: Annotated[
        Path | None, typer.Option(help="Folder of references, with the names of the pictures.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="To generate: a file of prompts, one for each reference.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="To generate: the model.")] = "tiny",
    question: Annotated[str, typer.Option(help="The question to raters.")] = "",
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Make a blind study of pictures by at least two methods.

    A picture of each method, all with the same name, is one question for raters. METHOD=ADAPTER generates the pictures
    with an adapter of the model, from the references in their order and the prompts.
    """
    from condit.serve.study import make_study

    folders: dict[str, Path] = {}
    for method in methods:
        name, equals, value = method.partition("=")
        if not equals or not name or not value:
            raise typer.BadParameter(f"methods are METHOD=FOLDER or METHOD=ADAPTER; found {method!r}")
        folders[name] = Path(value)
    drawn = {name: str(path) for name, path in folders.items() if not path.is_dir()}
    if drawn:
        if references is None or prompts is None:
            raise typer.BadParameter(
                f"{next(iter(drawn.values()))} is no folder; to generate, give --references and --prompts"
            )
        folders |= draw_methods(out, drawn, references, prompts, model, seed)
    items = make_study(out, folders, references, question=question, seed=seed)
    say(f"{len(items)} subjects, {len(folders)} methods; run `condit serve --study {out}`")
    typer.echo(str(out))


def draw_methods(
    out: Path, adapters: dict[str, str], references: Path, prompts: Path, model: str, seed: int
) -> dict[str, Path]:
    """Generates the pictures of methods that are adapters: one for each reference and its prompt."""
    from condit.cli.request import Reference, Request, Studio
    from condit.data.images import save_image
    from condit.data.prompt_table import read_words
    from condit.serve.study import pictures_of

    images, words = pictures_of(references), read_words(prompts)
    if len(words) != len(images):
        raise typer.BadParameter(f"{prompts} has {len(words)} prompts for {len(images)} references")
    studio = Studio(model)
    for method, adapter in adapters.items():
        for (name, path), prompt in zip(images.items(), words, strict=True):
            request = Request(prompt, model, (Reference(adapter, str(path)),), seed=seed)
            save_image(studio.generate(request).images[0], out / "drawn" / method / f"{name}.png")
    return {method: out / "drawn" / method for method in adapters}


@study_app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report scores with intervals, agreement between raters, and the number of answers still needed."""
    from dataclasses import asdict

    from condit.serve.preferences import as_text
    from condit.serve.preferences import report as run
    from condit.serve.study import Study

    study = Study(folder)
    found = run(study.answers, study.methods)
    if as_json:
        needed = [{"first": a, "second": b, "answers": count} for (a, b), count in found.needed.items()]
        answer({**asdict(found), "needed": needed})
    else:
        typer.echo(as_text(found))
