"""The command `condit edit`."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from condit.cli.options import ModelOptions, OutputOptions, ReferenceOptions, with_options
from condit.cli.own import is_own, load_own
from condit.cli.terminal import Seed, answer, say

if TYPE_CHECKING:
    from condit.drawing.edit import EditMethod

TYPES = "swap, attribute, style, background, shape, add, remove, or none"


@dataclass(frozen=True)
class EditOptions:
    """Edit"""

    kind: Annotated[str, typer.Option("--type", "-t", help=f"Type of edit: {TYPES}.")] = "swap"
    mask: Annotated[str | None, typer.Option("--mask", help="Mask: white where the image may change.")] = None
    reweight: Annotated[
        list[str] | None, typer.Option("--reweight", metavar="WORD=F", help="Multiply the attention to a word by F.")
    ] = None
    merge: Annotated[float, typer.Option(help="Share of tokens to merge, 0 to 0.75; for 1024 tokens or more.")] = 0.0
    negative: Annotated[str | None, typer.Option("--negative", help="The negative prompt.")] = None
    steps: Annotated[
        int | None, typer.Option(help="Steps of the inversion and of the edit, each [default: the model's].")
    ] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text [default: the model's].")] = None
    solver: Annotated[str | None, typer.Option(help="Solver of the inversion [default: the model's].")] = None
    height: Annotated[
        int | None, typer.Option(help="Height in pixels [default: the image's aspect ratio, at most the model's area].")
    ] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None
    method: Annotated[
        str | None, typer.Option("--method", metavar="FILE.py:NAME", help="Your own edit method, such as FlowEdit.")
    ] = None
    seed: Seed = 0
    page: Annotated[
        Path | None,
        typer.Option("--page", help="Also write a PNG of source, reconstruction, edit and the words' attention maps."),
    ] = None


@with_options
def edit(
    image: Annotated[str, typer.Argument(help="The image to edit.", show_default=False)],
    source: Annotated[str, typer.Argument(help="Prompt of the image, e.g. 'a cat'.", show_default=False)],
    target: Annotated[str, typer.Argument(help="Prompt of the edited image, e.g. 'a dog'.", show_default=False)],
    *,
    options: EditOptions,
    model: ModelOptions,
    references: ReferenceOptions,
    output: OutputOptions,
) -> None:
    """Edit an image with prompts.

    Inverts the image to noise and generates it together with its edit; parts that the prompts do not change are kept.
    """
    from condit.cli.generate import studio_of
    from condit.cli.outputs import free_paths, output_paths
    from condit.cli.reference import images_of, read_references
    from condit.data.images import check_output, load_image, save_image

    factors = {}
    for value in options.reweight or ():
        word, equals, factor = value.partition("=")
        try:
            factors[word] = float(factor)
        except ValueError:
            equals = ""
        if not equals or not word:
            raise typer.BadParameter(f"--reweight takes WORD=F, as in fluffy=2; found {value!r}")
    given = asdict(references)
    try:
        guides = read_references(given, given.pop("strength"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    inputs = (image, *images_of(guides), *([options.mask] if options.mask else []))
    for path in inputs:
        load_image(path)  # a broken image raises before the model is loaded, which takes seconds
    named = output_paths(target, output.out, options.seed, 1)
    (target_path,) = free_paths(named, output.out, inputs, force=output.force)
    kind, method, page = options.kind, options.method, options.page
    if page is not None and page.suffix.lower() != ".png":
        raise typer.BadParameter(f"--page {page}: expected a name that ends in .png")
    if page is not None:
        free_paths([page], page, [*inputs, target_path], force=output.force)
        if page.resolve() == target_path.resolve():
            raise typer.BadParameter(f"--page {page} is the name of the edited image; choose another")
    for path in [target_path] if page is None else [target_path, page]:
        check_output(path)
    import condit
    from condit.controls.dit4edit import PRESETS

    if kind not in (*PRESETS, "none"):
        raise typer.BadParameter(f"--type must be one of {TYPES}; found {kind!r}")
    if method is not None and not is_own(method):
        raise typer.BadParameter(f"--method takes FILE.py:NAME; found {method!r}")
    if kind == "none" and factors:
        raise typer.BadParameter("--reweight changes the attention, which --type none does not control")
    start = time.perf_counter()
    studio = studio_of(model)()
    if studio.pipe.model.inversion is None:
        raise ValueError(f"{model.model!r} does not support edits. Use tiny-pixart, tiny, PixArt or FLUX.1")
    controls: list[condit.Control] = [] if kind == "none" else [replace(PRESETS[kind], reweight=factors)]
    if options.merge:
        controls.append(condit.TokenMerging(options.merge))
    controls += studio.adapters.controls(guides)
    result = studio.pipe.edit(
        image,
        source,
        target,
        controls=controls,
        mask=options.mask,
        negative_prompt=options.negative,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        height=options.height,
        width=options.width,
        maps=page is not None,
        solver=options.solver,  # type: ignore[arg-type]  # an unknown one raises
        method=None if method is None else cast("EditMethod", load_own(method)()),
        seed=options.seed,
        progress=True,
    )
    recipe = {**result.recipe, "condit": condit.__version__, "edited": Path(image).name}
    save_image(result.images[0], target_path, recipe=None if output.no_metadata else recipe)
    seconds = round(time.perf_counter() - start, 2)
    if page is not None:
        from condit.drawing.edit_page import edit_page

        save_image(edit_page(result, source, target), page)
    if output.as_json:
        answer({"image": str(target_path), "page": page and str(page), "seconds": seconds, "recipe": recipe})
        return
    say(f"edited in {seconds} s" + (f"; reconstruction {result.psnr[0]:.1f} dB" if result.psnr else ""))
    typer.echo(str(target_path))
    if page is not None:
        typer.echo(str(page))
