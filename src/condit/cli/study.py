"""The commands train, data draw and data check."""

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from condit.cli.options import JobOptions, ModelOptions, with_options
from condit.cli.terminal import Debug, Json, Seed, answer, say
from condit.data.locks import has_files


@dataclass(frozen=True)
class DrawOptions:
    """Sampling"""

    negative: Annotated[str | None, typer.Option("--negative", help="The negative prompt.")] = None
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text [default: the model's].")] = None
    height: Annotated[int | None, typer.Option(help="Height in pixels [default: the model's].")] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels [default: the model's].")] = None
    seed: Seed = 0


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/flux-canny.toml.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME].", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint; under torchrun also start.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a model or an adapter with a recipe."""
    if not recipe.is_file():
        raise typer.BadParameter(f"no recipe at {recipe}")
    folder = out or Path("runs") / recipe.stem
    restarted = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun starts lost processes again with the same command
    if resume and not restarted and not folder.is_dir():
        raise typer.BadParameter(f"{folder} holds no run to resume. Is -o the folder of the run? Or leave --resume out")
    if not resume and has_files(folder):
        raise typer.BadParameter(
            f"{folder} already holds a run; add --resume to continue it, or choose another folder with -o"
        )
    folder.mkdir(parents=True, exist_ok=True)  # before the long imports: a run that is stopped in them can be resumed
    from condit.training.run import train as run

    try:
        run(recipe, out=folder, resume=resume)
    except KeyboardInterrupt:
        if (folder / "state.pt").exists():
            say(f"continue with: {shlex.join(['condit', 'train', str(recipe), '-o', str(folder), '--resume'])}")
        raise
    typer.echo(str(folder))


@dataclass(frozen=True)
class TableOptions:
    """Table of prompts"""

    subjects: Annotated[Path, typer.Option("--subjects", help="File of subjects, one per line.", show_default=False)]
    styles: Annotated[Path, typer.Option("--styles", help="File of styles, one per line.", show_default=False)]
    per_subject: Annotated[int, typer.Option("--per-subject", help="Styles for each subject.")] = 14
    images: Annotated[int, typer.Option("--images", "-n", help="Images for each prompt.")] = 4
    template: Annotated[str, typer.Option(help="Template of the prompts.")] = "{subject}, {style}"
    prune: Annotated[bool, typer.Option("--prune", help="Delete images that the lists no longer give.")] = False


@with_options
def generate_data(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the data set.", show_default=False)],
    table: TableOptions,
    sampling: DrawOptions,
    model: ModelOptions,
    job: JobOptions,
    debug: Debug = False,
) -> None:
    """Generate a data set of image pairs.

    Every subject is generated in a number of styles, with more than one image per prompt. Images of a prompt share
    their style, images of a subject their content. DEADiff and IP-Adapter train on such pairs.
    An interrupted run continues where it stopped, with the same model and settings.
    """
    from condit.cli.rows import StudioOpener, run_job
    from condit.data.prompt_table import prompt_table, read_words
    from condit.jobs.groups import groups_job

    for file in (table.subjects, table.styles):
        if not file.is_file():
            raise typer.BadParameter(f"no file {file}")
    how = {"per_subject": table.per_subject, "template": table.template, "seed": sampling.seed}
    rows = prompt_table(read_words(table.subjects), read_words(table.styles), **how)
    common = {"model": model.model, **asdict(sampling)}
    del common["seed"]  # rows have their own
    common = {name: value for name, value in common.items() if value is not None or name not in ("height", "width")}
    opener = StudioOpener(model, common, with_recipe=False)
    how = {"images": table.images, "seed": sampling.seed, "threads": job.threads, "prune": table.prune}
    outcome = run_job(groups_job(out, rows, opener, settings=common, **how), model, job)
    typer.echo(str(out))
    if outcome.errors:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(help="A model's file or folder, or an adapter's file.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="A folder for a model, a .safetensors file for an adapter.")],
    to: Annotated[Literal["diffusers", "peft", "kohya"] | None, typer.Option(help="Layout of a LoRA.")] = None,
    base: Annotated[str, typer.Option(help="The model that a LoRA is for: flux, sd15, sd21 or sdxl.")] = "flux",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of a model.")] = "float32",
    debug: Debug = False,
) -> None:
    """Convert a model or an adapter to another layout.

    A single file of Stable Diffusion or FLUX.1 becomes a folder that diffusers and condit load.
    """
    if target.suffix == ".safetensors":
        from condit.weights.convert import convert_adapter

        typer.echo(str(convert_adapter(source, target, to, base)))
        return
    if target.suffix or to is not None:
        raise typer.BadParameter(f"{target}: --to and files are for adapters, which end in .safetensors")
    import torch

    import condit

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    typer.echo(str(condit.Pipeline.from_pretrained(source, dtype=kinds[dtype]).save_pretrained(target)))


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
