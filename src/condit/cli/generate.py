"""Commands that generate images (demo, generate, replay), make conditions (annotate) and estimate costs (plan)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from condit.cli.options import (
    JobOptions,
    ModelOptions,
    OutputOptions,
    ReferenceOptions,
    SamplingOptions,
    StartOptions,
    with_options,
)
from condit.cli.outputs import Force, free_paths, generate_and_save, output_paths, report
from condit.cli.reference import read_references
from condit.cli.terminal import Debug, Json, Seed, answer, output_folder, say, waiting

if TYPE_CHECKING:
    from condit.cli.request import Request, Studio


def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the grid and its references.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate a labelled grid of example images.

    Uses the embedded models, and prints for every image the command that reproduces it.
    """
    from condit.cli.demo import generate_demo

    result = generate_demo(out or output_folder(), seed=seed, tell=say)
    if as_json:
        answer(result)
    else:
        typer.echo(result["grid"])


@with_options
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts, in English or Chinese; for DiT and DiffiT classes.", metavar="PROMPT", show_default=False
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="ROWS.jsonl",
            help="A request in each row; only missing images are made.",
            show_default=False,
        ),
    ] = None,
    *,
    model: ModelOptions,
    references: ReferenceOptions,
    sampling: SamplingOptions,
    start: StartOptions,
    output: OutputOptions,
    job: JobOptions,
) -> None:
    """Generate images from prompts and references.

    References give the style, the subject or the edges of the image, and can be combined.
    A reference can have its own strength and settings: --style ref.png:0.6,when=0-0.7,mask=left.png

    \b
    when=0-0.7        part of the schedule in which it acts
    where=PATH.*      layers in which it acts; several joined by +
    mask=FILE         where in the image it acts (white)
    preset=style      InstantStyle: all, style, layout or style+layout
    subtract=a cat    InstantStyle: words for content to subtract
    as=content        DEADiff: style (default) or content
    task=subject-512  OminiControl: the task of a file that does not say
    cached=first-step OminiControl: first-step or independent
    """
    from condit.cli.adapters import check_uses
    from condit.cli.reference import images_of
    from condit.data.images import load_image

    if bool(prompts) == (rows is not None):
        raise typer.BadParameter(
            "give one prompt or more, or --from ROWS.jsonl"
            if not prompts
            else "give prompts, or --from with rows, not both"
        )
    common = request_fields(model, sampling, start, references)
    if rows is not None:
        from condit.cli.rows import generate_rows

        generate_rows(rows, output.out or output_folder() / rows.stem, common, model, output, job)
        return
    drawn, kept = output.candidates, sampling.count
    if drawn is not None:
        if sampling.count != 1 or output.best > drawn:
            wrong = f"--best {output.best}" if sampling.count == 1 else f"-n {sampling.count}"
            raise typer.BadParameter(f"{wrong} with --candidates {drawn}: give --best, at most --candidates, and no -n")
        common["count"], kept = drawn, output.best
    made = [request_of({**common, "prompt": prompt}) for prompt in prompts or ()]
    if len(made) > 1 and output.out is not None and output.out.suffix and not output.out.is_dir():
        raise typer.BadParameter(f"-o {output.out}: {len(made)} prompts need a folder")
    first = made[0]
    inputs = (*images_of(first.references), *(p for p in (first.image, first.mask) if p))
    first_number = first.seed if drawn is None else 1  # of candidates, the best is 1
    named = [path for r in made for path in output_paths(r.prompt, output.out, first_number, kept)]
    paths = iter(free_paths(named, output.out, inputs, force=output.force))
    check_uses(first.model, first.references)
    for path in inputs:
        load_image(path)  # a broken image raises before the model is loaded, which takes seconds
    load = studio_of(model)
    saved = [
        generate_and_save(
            r,
            list(islice(paths, kept)),
            range(kept) if drawn is None else None,
            with_recipe=not output.no_metadata,
            load=load,
        )
        for r in made
    ]
    report(saved, as_json=output.as_json)


def request_fields(
    model: ModelOptions, sampling: SamplingOptions, start: StartOptions, references: ReferenceOptions
) -> dict[str, Any]:
    """The fields of a `Request` by options, without the prompt."""
    options = asdict(references)
    try:
        read = read_references(options, options.pop("strength"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return {"model": model.model, "references": read, **asdict(sampling), **asdict(start)}


def request_of(fields: Mapping[str, Any]) -> "Request":
    """A request; a wrong value is wrong usage."""
    from condit.cli.request import Request

    try:
        return Request(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def studio_of(model: ModelOptions) -> Callable[[], "Studio"]:
    """Loads the model at the first call."""

    @cache
    def load() -> "Studio":
        from condit.cli.request import Studio

        with waiting(f"loading {model.model}"):
            return Studio(model.model, model.device, offload=model.offload, quantize=model.quantize)

    return load


def read_any_recipe(source: Path) -> dict[str, object]:
    """The recipe of an image, or of a .json file."""
    from condit.data.images import parse_recipe, read_recipe

    if source.suffix.lower() != ".json":
        return read_recipe(source)
    if not source.is_file():
        raise FileNotFoundError(f"no recipe at {source}")
    return parse_recipe(source.read_text(encoding="utf-8"), str(source))


def recipe(
    image: Annotated[Path, typer.Argument(help="An image generated by condit.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .json file [default: print it].")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Print the recipe of an image, or write it as a JSON file.

    `condit replay` reproduces the image from either.
    """
    from condit.data.files import atomic_write

    made = read_any_recipe(image)
    if out is None:
        answer(made)
        return
    (out,) = free_paths([out], out, [image], force=force)
    text = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    typer.echo(str(atomic_write(out, lambda path: path.write_text(text, encoding="utf-8"))))


def replay(
    image: Annotated[
        Path, typer.Argument(help="An image generated by condit, or its recipe.json.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output file [default: next to the image, with -replay].")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="FILE.py:NAME", help="Your own code that the recipe uses."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reproduce an image from the recipe stored in it.

    Reports whether the image is identical, and what has changed since it was generated.
    """
    from condit.cli.own import is_own, refuse_unnamed
    from condit.cli.reference import images_of
    from condit.cli.request import Request, differences, locate
    from condit.data.images import load_image

    stored = read_any_recipe(image)
    request, index = Request.from_recipe(stored)
    own = refuse_unnamed((r.use for r in request.references if is_own(r.use)), control or ())
    references = tuple(replace(r, use=own.get(r.use, r.use)) for r in request.references)
    request = locate(replace(request, references=references), image.parent)
    alone = image.suffix.lower() == ".json"
    before = None if alone or image.suffix.lower() == ".svg" else load_image(image)
    target = out or image.with_name(f"{image.stem}-replay{'.png' if alone else image.suffix}")
    (target,) = free_paths([target], out, [image, *images_of(request.references)], force=force)
    load = studio_of(ModelOptions(request.model))
    saved = generate_and_save(request, [target], [index], with_recipe=True, load=load)
    report([saved], as_json=as_json)
    for difference in differences(stored, saved.recipes[index]):
        say(f"warning: {difference}")
    if before is not None:
        same = before.tobytes() == load_image(target).tobytes()
        say("the image is identical" if same else "the image differs from the one in the file")


def annotate(
    image: Annotated[Path, typer.Argument(help="An image.", show_default=False)],
    kind: Annotated[str, typer.Argument(help="canny, edges, lines, soft_edges, gray, blur, blur-5, blur-10 or depth.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output file [default: next to the image, with the kind].")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Resize to this height first; lines depend on the size.")] = None,
    width: Annotated[int | None, typer.Option(help="Resize to this width first.")] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a condition from an image: edges, gray, blur or depth.

    depth needs the weights of a depth network, which condit does not include.
    """
    from condit.data.images import check_output, load_image, save_image
    from condit.drawing.references import ANNOTATORS, MAX_SIDE

    if kind not in ANNOTATORS:
        raise typer.BadParameter(f"expected one of {', '.join(ANNOTATORS)}; found {kind!r}")
    (target,) = free_paths([out or image.with_name(f"{image.stem}-{kind}.png")], out, [image], force=force)
    source = load_image(image, mode="RGBA" if kind in ("edges", "lines", "soft_edges") else "RGB")
    check_output(target)
    if height is not None or width is not None:
        size = width or source.width, height or source.height
        if min(size) < 1:
            raise typer.BadParameter("--height and --width must be at least 1")
        if max(size) > MAX_SIDE:
            raise typer.BadParameter(f"--height and --width are at most {MAX_SIDE}; found {max(size)}")
        source = source.resize(size)
    typer.echo(str(save_image(ANNOTATORS[kind](source), target)))


@dataclass(frozen=True)
class Workload:
    """Call"""

    height: Annotated[int, typer.Option(help="Height in pixels.")] = 1024
    width: Annotated[int, typer.Option(help="Width in pixels.")] = 1024
    steps: Annotated[int, typer.Option(help="Number of inference steps.")] = 28
    count: Annotated[int, typer.Option("--count", "-n", help="Batch size.")] = 1
    controls: Annotated[int, typer.Option(help="Number of OminiControl conditions.")] = 0
    condition: Annotated[int | None, typer.Option(help="Side of a condition in pixels [default: the image's].")] = None
    cached: Annotated[bool, typer.Option("--cached", help="Conditions are independent and cached.")] = False
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")] = "bfloat16"
    quantize: Annotated[Literal["float8", "int8"] | None, typer.Option(help="Quantise the transformer's blocks.")] = (
        None
    )
    offload: Annotated[Literal["encoders", "blocks"] | None, typer.Option(help="Keep these on the CPU.")] = None


@with_options
def plan(
    model: Annotated[str, typer.Argument(help="A model's name, folder or file, or a preset such as flux-dev.")],
    work: Workload,
    components: Annotated[Path | None, typer.Option(help="Folder of the parts that a single file lacks.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Measure this device and estimate the time.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate memory and time without loading a model.

    Reads only configurations and the headers of files.
    """
    import torch

    from condit.weights.plan import Wish, measured_rate
    from condit.weights.plan import plan as run

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[work.dtype]
    wish = Wish(
        height=work.height,
        width=work.width,
        steps=work.steps,
        batch=work.count,
        controls=work.controls,
        condition_size=None if work.condition is None else (work.condition, work.condition),
        mode="cached" if work.cached else "joint",
        dtype=kind,
        quantize=work.quantize,
        offload=work.offload,
    )
    rate = None if device is None else measured_rate(device, kind)
    estimate = run(model, wish, components=components, rate=rate)
    if as_json:
        answer(estimate.as_json())
        return
    tokens = f"estimated; {estimate.tokens + estimate.condition_tokens:,} tokens"
    where = f"with offload={estimate.offload}" if estimate.offload else "everything on the device"
    gigabytes = [(p.name, f"{p.parameters:,} parameters", p.loaded) for p in estimate.parts]
    gigabytes.append(("activations", tokens, estimate.activations))
    if estimate.cache:
        gigabytes.append(("cache", f"{estimate.condition_tokens:,} tokens of conditions", estimate.cache))
    for name, text, size in [*gigabytes, ("peak", where, estimate.resident)]:
        typer.echo(f"{name:<16} {size / 1e9:9.3f} GB  {text}")
    typer.echo(f"{'a step':<16} {estimate.operations_a_step / 1e12:9.3f} TFLOP")
    if len(estimate.parts) == 1:
        say("this counts the transformer only; name a folder or a file to include text encoders and autoencoder")
    if estimate.seconds is not None and estimate.rate is not None:
        typer.echo(f"{'time':<16} {estimate.seconds:9.1f} s   {work.steps} steps at {estimate.rate / 1e12:.3g} TFLOP/s")
