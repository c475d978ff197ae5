"""`condit evaluate`: one command for each thing that is measured."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from condit.cli.terminal import Debug, Json, Seed, answer, output_folder, say

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the JSON and the page.", show_default=False)]
Data = Annotated[
    Path | None, typer.Option("--data", help="An icon world made by `condit data icons`.", show_default=False)
]
Claims = Annotated[Path | None, typer.Option("--claims", help="Page to write what they show into, as docs/claims.md.")]
Count = Annotated[int, typer.Option("--count", "-n", help="Pictures a measure.")]


def tiny(
    out: Out = None,
    data: Data = None,
    count: Count = 512,
    quick: Annotated[bool, typer.Option("--quick", help="64 pictures a measure, to see that it works.")] = False,
    sets: Annotated[str | None, typer.Option("--sets", help="Sets to draw, separated by commas.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Draw in bfloat16: faster where the CPU knows it.")] = False,
    eta: Annotated[float | None, typer.Option(help="Fresh noise a step, 0 to 1 [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text [default: the model's].")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the embedded model and its adapters."""
    from condit_lab.suites.tiny import evaluate

    drawn = {"bf16": bf16, "eta": eta, "guidance": guidance}
    result = evaluate(folder(out), data=data, count=count, seed=seed, quick=quick, sets=names(sets), **drawn)
    show(result, folder(out), as_json)


def style(
    out: Out = None,
    data: Data = None,
    count: Count = 512,
    quick: Annotated[bool, typer.Option("--quick", help="16 pictures a measure, to see that it works.")] = False,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Separated by commas [default: all that can run].")
    ] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option("--strengths", help='"0.3,1" for every method, "plain=0.3,1" for one; repeatable.'),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="combo, held-out combinations; or style, the never-trained style.")
    ] = "combo",
    sites: Annotated[
        str | None, typer.Option("--sites", help="Layers of the style block [default: by the block probe].")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the sampler.")] = 20,
    bf16: Annotated[bool, typer.Option("--bf16", help="Draw in bfloat16: faster where the CPU knows it.")] = False,
    adain: Annotated[Path | None, typer.Option("--adain", help="Folder of AdaIN's weights, for that baseline.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Page to write the tables into.")] = None,
    claims: Claims = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods of style transfer as curves over their strength."""
    if split not in ("combo", "style"):
        raise typer.BadParameter(f"--split must be combo or style; found {split!r}.")
    from condit_lab.suites.style import QUICK, Protocol, evaluate_style, write_table

    kept = min(count, QUICK) if quick else count
    where: Literal["combo", "style"] = "combo" if split == "combo" else "style"
    protocol = Protocol(kept, seed, names(methods), tuple(strengths or ()), where, names(sites) or (), steps, bf16)
    result = evaluate_style(folder(out), protocol, data=data, adain=adain)
    if table is not None:
        write_table(result, table)
        say(f"written into {table}")
    if claims is not None:
        from condit_lab.suites.claims import write
        from condit_lab.suites.style_claims import style_claims

        write(claims, style_claims(result))
        say(f"written into {claims}")
    show(result, folder(out), as_json)


def edit(
    out: Out = None,
    data: Data = None,
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, tiny-pixart, or a folder as those.")] = "tiny",
    count: Annotated[int, typer.Option("--count", "-n", help="Edits a task, at most 64.")] = 64,
    quick: Annotated[bool, typer.Option("--quick", help="4 edits a task, to see that it works.")] = False,
    steps: Annotated[int, typer.Option("--steps", help="Steps of an edit, up and down.")] = 20,
    trips: Annotated[str, typer.Option("--trips", help="Steps of round trips, separated by commas.")] = "10,20,50",
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Of concept, vendor, icons, photographs (round trips), speed [default: all]."),
    ] = None,
    claims: Claims = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure edits whose true result is known, and round trips to noise."""
    from condit_lab.suites.edit import TASKS, evaluate_edit

    result = evaluate_edit(
        folder(out),
        data=data,
        count=4 if quick else min(count, 64),
        seed=seed,
        model=model,
        steps=steps,
        trip_steps=step_counts(trips),
        tasks=names(tasks) or TASKS,
        tell=say,
    )
    if claims is not None:
        from condit_lab.suites.claims import write
        from condit_lab.suites.edit_claims import edit_claims

        write(claims, edit_claims(result))
        say(f"written into {claims}")
    show(result, folder(out), as_json)


def classes(
    runs: Annotated[list[str], typer.Argument(help="Exported class models to compare.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", help="An icon world made by `condit data icons`.", show_default=False)
    ],
    out: Out = None,
    count: Count = 512,
    quick: Annotated[bool, typer.Option("--quick", help="64 pictures a measure, to see that it works.")] = False,
    vae: Annotated[str, typer.Option("--vae", help="The autoencoder that the models were trained on.")] = "tiny",
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Folder of another judge of style.", show_default=False)
    ] = None,
    claims: Claims = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare class models: DiT, DiffiT, ViT."""
    from condit_lab.suites.classes import evaluate_classes

    result = evaluate_classes(
        runs, folder(out), data=data, vae=vae, judge=judge, count=64 if quick else count, seed=seed
    )
    if claims is not None:
        from condit_lab.suites.claims import write
        from condit_lab.suites.class_claims import class_claims

        write(claims, class_claims(result))
        say(f"written into {claims}")
    show(result, folder(out), as_json)


def folder(out: Path | None) -> Path:
    return out or output_folder() / "evaluation"


def show(result: object, where: Path, as_json: bool) -> None:
    """The figures themselves, or the folder that holds them."""
    answer(result) if as_json else typer.echo(str(where))


def step_counts(text: str) -> tuple[int, ...]:
    """ "10,20" as numbers."""
    counts = names(text) or ()
    if not counts or not all(part.isdigit() and int(part) > 0 for part in counts):
        raise typer.BadParameter(f"--trips takes numbers of steps, as in 10,20; found {text!r}.")
    return tuple(int(part) for part in counts)


def names(text: str | None) -> tuple[str, ...] | None:
    """ "a, b" as names."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())
