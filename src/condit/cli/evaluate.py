"""`condit evaluate`: measurements. The laboratory adds its own to this group."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from condit.cli.options import Grouped, JobOptions, ModelOptions, with_options
from condit.cli.outputs import Force, free_paths
from condit.cli.terminal import Debug, Json, Seed, answer, say
from condit.data.files import check_writable

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


@dataclass(frozen=True)
class SampleOptions:
    """Sampling"""

    count: Annotated[int, typer.Option("--count", "-n", help="Number of images.", min=1)] = 50_000
    batch: Annotated[int, typer.Option("--batch", help="Images at once.", min=1)] = 32
    steps: Annotated[int | None, typer.Option(help="Number of inference steps [default: the model's].")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale [default: the model's].")] = None
    seed: Seed = 0


@app.command(cls=Grouped)
@with_options
def samples(
    out: Annotated[Path, typer.Argument(help="The .npz file.", show_default=False)],
    sampling: SampleOptions,
    model: ModelOptions,
    job: JobOptions,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Generate images of random classes for ADM's evaluator: an .npz with arr_0.

    The same command continues where it stopped. Processes of torchrun or SLURM share the work.
    """
    if out.suffix != ".npz":
        raise typer.BadParameter(f"{out}: expected a name that ends in .npz")
    free_paths([out], out, (), force=force)
    check_writable(out)
    from condit.cli.rows import ClassOpener, run_job
    from condit.jobs.plan import files_in
    from condit.rulers.samples import samples_job, write_npz
    from condit.weights.load import identify

    if identify(model.model).kind not in ("dit", "diffit"):
        raise ValueError(f"{model.model!r} generates no classes. Use DiT or DiffiT")
    s, folder = sampling, out.with_name(f"{out.name}.parts")
    settings = {"model": model.model, "count": s.count, "steps": s.steps, "guidance": s.guidance}
    opener = ClassOpener(model, {"steps": s.steps, "guidance": s.guidance})
    made = samples_job(folder, s.count, opener, settings, batch=s.batch, seed=s.seed, threads=job.threads)
    if run_job(made, model, job).errors:
        raise typer.Exit(1)
    if len(files_in(folder, made.rows)) < len(made.rows):
        say("the other processes have not finished; the last one writes the file")
        return
    typer.echo(str(write_npz(made, out)))
    if "WORLD_SIZE" not in os.environ:  # else another process may read them
        shutil.rmtree(folder, ignore_errors=True)


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


@dataclass(frozen=True)
class FolderOptions:
    """Comparison"""

    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="NAME=SOURCE", help="clip, csd, dino, vgg, lpips, inception or aesthetic."),
    ] = None
    blank: Annotated[
        str | None, typer.Option("--blank", help="The method that saw no reference [default: none, if it is there].")
    ] = None
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Its curve is compared with [default: the most strengths].")
    ] = None
    axis: Annotated[str | None, typer.Option("--axis", help="Ruler of style [default: the one that tells best].")] = (
        None
    )
    study: Annotated[
        Path | None, typer.Option("--study", help="Folder of a preference study: do rulers agree with people?")
    ] = None


@app.command(cls=Grouped)
@with_options
def folder(
    output: Annotated[Path, typer.Option("--output", help="Pictures as METHOD/STRENGTH/NAME.png.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.", show_default=False)],
    options: FolderOptions,
    style: Annotated[Path | None, typer.Option("--style", help="The style references.", show_default=False)] = None,
    content: Annotated[Path | None, typer.Option("--content", help="The content pictures.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the pictures of any methods: style, content, prompt, leakage.

    Generates nothing. First measures its own rulers on the given pictures; compares methods at equal style.
    """
    if unnamed := [entry for entry in options.weights or [] if "=" not in entry]:
        raise typer.BadParameter(f"--weights {unnamed[0]}: expected NAME=SOURCE, such as csd=csd.pth")
    from condit.data.locks import locked
    from condit.rulers.report import FolderSettings, evaluate_folder

    answers = []
    if options.study is not None:
        from condit.serve.preferences import failed_checks
        from condit.serve.study import Study

        answers = Study(options.study).answers
        failed = failed_checks(answers)
        answers = [a for a in answers if a["rater"] not in failed]
    weights = dict(entry.split("=", 1) for entry in options.weights or [])
    settings = FolderSettings(weights, options.blank, options.baseline, options.axis, answers)
    with locked(out, "evaluating"):
        result = evaluate_folder(output, out, content, style, settings)
    for kind, names in sorted(result["problems"].items()):
        say(f"{kind}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    answer(result) if as_json else typer.echo(str(out / "index.html"))
