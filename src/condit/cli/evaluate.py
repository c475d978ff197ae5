"""`condit evaluate`: measurements. The laboratory adds its own to this group."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from condit.cli.options import Grouped, ModelOptions, with_options
from condit.cli.terminal import Debug, Json, Seed, answer, say

app = typer.Typer(help="Measure adapters and models.", no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class MeasureOptions:
    """Measurement"""

    pairs: Annotated[Path, typer.Option("--pairs", help="A folder with metadata.jsonl, or tars.", show_default=False)]
    role: Annotated[str, typer.Option("--role", help="The role of its references in the pairs.")] = "style"
    count: Annotated[int, typer.Option("--count", "-n", help="Number of pairs.")] = 32
    strength: Annotated[float, typer.Option(help="Strength of the references.")] = 1.0
    clip: Annotated[
        str | None, typer.Option("--clip", help="Folder of a CLIP that compares [default: the model's own].")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None
    seed: Seed = 0


@app.command(cls=Grouped)
@with_options
def adapter(
    source: Annotated[str, typer.Argument(help="An adapter by name, file or folder.", show_default=False)],
    options: MeasureOptions,
    model: ModelOptions,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure whether an adapter follows its reference, keeps the prompt and leaks.

    Generates three images for each pair and compares them; each figure has a 95 % interval over the pairs.
    """
    from condit.data.pairs import open_pairs

    data = open_pairs(options.pairs)
    if not min(options.count, len(data)) >= 2:
        raise typer.BadParameter(f"an interval needs at least two pairs; found {min(options.count, len(data))}")
    data[0].one(options.role)  # raises before the model is loaded
    import condit
    from condit.cli.generate import studio_of
    from condit.cli.reference import Reference
    from condit.training.adapter_report import QUESTIONS, evaluate_adapter, eyes_of

    studio = studio_of(model)()
    loaded = studio.adapters.adapter(Reference(source, ""))
    if isinstance(loaded, condit.StyleLoRA):
        raise ValueError(f"{source} is a style LoRA, which reads no reference")
    annotator = loaded.config.annotator if isinstance(loaded, condit.OminiControl) else None
    eyes = eyes_of(studio.pipe, annotator, options.clip)
    answers = evaluate_adapter(
        studio.pipe,
        lambda image: loaded.control(image, options.strength),
        data,
        options.role,
        eyes,
        count=options.count,
        seed=options.seed,
        steps=options.steps,
    )
    if as_json:
        answer([{**asdict(row), "reading": row.reading} for row in answers])
        return
    for row in answers:
        typer.echo(f"{row.question:<8} {row.mean:+.4f} +- {row.error:.4f}  n={row.n}  {row.reading}")
        say(f"         {QUESTIONS[row.question]}")
    if len(answers) < len(QUESTIONS):
        say("prompt and leakage were not measured: the model has no text tower of a CLIP; give --clip FOLDER")
