"""Commands that draw: demo, generate, replay; annotate, which makes conditions; plan, which says what drawing takes."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from condit.cli.terminal import Debug, Json, Seed, answer, output_folder, say, waiting


def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the grid and its references.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a labelled grid of what tiny can do.

    Every picture comes with the command that draws it again.
    """
    from condit.cli.demo import draw_demo

    result = draw_demo(out or output_folder(), seed=seed, tell=say)
    if as_json:
        answer(result)
    else:
        typer.echo(result["grid"])


def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to draw, in English or Chinese; of DiT and DiffiT a class.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A name of `condit models`, a folder or a file.")
    ] = "tiny",
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
        list[str] | None,
        typer.Option(
            "--control", metavar="ADAPTER=REF[:S]", help="Any adapter by name, or a control of your own: FILE.py:NAME."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="Strength S of references that name none.")] = 1.0,
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep away from.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance by the text [default: the model's].")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="Guidance by the references, apart from the text [default: none].")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, dpm++, euler, euler-ancestral, ...; Stable Diffusion [default: its own].")
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Share of each step's noise that is drawn afresh, 0 to 1 [default: the model's]."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels [default: the model's].")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels [default: the model's].")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture (Stable Diffusion).", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Repaint the image where this one is white.", show_default=False)
    ] = None,
    change: Annotated[float | None, typer.Option(help="How much of the image to change, to 1 [default: 0.8].")] = None,
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
    from condit.cli.request import Reference, Request
    from condit.data.images import load_image

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
        request = Request(
            prompt,
            model,
            tuple(references),
            negative,
            seed,
            count,
            steps,
            guidance,
            image_guidance,
            sampler=sampler,
            eta=eta,
            height=height,
            width=width,
            image=None if image is None else str(image),
            mask=None if mask is None else str(mask),
            change=change,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    paths = output_paths(request.prompt, out, seed, count, no_metadata)
    given = [reference.path for reference in request.references] + [p for p in (request.image, request.mask) if p]
    for path in given:  # a wrong picture is told before seconds are spent on loading the model
        load_image(path)
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
    from condit.cli.request import Studio
    from condit.data.images import save_image

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


def replay(
    image: Annotated[Path, typer.Argument(help="A PNG drawn by condit.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it [default: beside it, with -replay].")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="FILE.py:NAME", help="Code of your own that the recipe names too."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a PNG again from the recipe inside it.

    Says whether it came out the same, and what has changed since.
    """
    from dataclasses import replace

    from condit.cli.own import is_own, refuse_unnamed
    from condit.cli.request import Request, differences, locate
    from condit.data.images import load_image, read_recipe

    recipe = read_recipe(image)
    request, index = Request.from_recipe(recipe)
    own = refuse_unnamed((r.use for r in request.references if is_own(r.use)), control or ())
    references = tuple(replace(r, use=own.get(r.use, r.use)) for r in request.references)
    request = locate(replace(request, references=references), image.parent)
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


def annotate(
    image: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    kind: Annotated[str, typer.Argument(help="canny, edges, lines, soft_edges, gray, blur, blur-5, blur-10 or depth.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it [default: beside it, with the kind].")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Scale to this height first; lines depend on the size.")] = None,
    width: Annotated[int | None, typer.Option(help="And to this width.")] = None,
    debug: Debug = False,
) -> None:
    """Make the condition of a picture: edges, gray, blur or depth.

    depth needs the weights of a depth network, which are not part of condit.
    """
    from condit.data.images import load_image, save_image
    from condit.drawing.references import ANNOTATORS

    if kind not in ANNOTATORS:
        raise typer.BadParameter(f"there are {', '.join(ANNOTATORS)}; found {kind!r}")
    picture = load_image(image, mode="RGBA" if kind in ("edges", "lines", "soft_edges") else "RGB")
    if height is not None or width is not None:
        size = width or picture.width, height or picture.height
        if min(size) < 1:
            raise typer.BadParameter("--height and --width are at least 1")
        picture = picture.resize(size)
    target = out or image.with_name(f"{image.stem}-{kind}.png")
    typer.echo(str(save_image(ANNOTATORS[kind](picture), target)))


def plan(
    model: Annotated[str, typer.Argument(help="A FLUX.1 folder or file, tiny, or a preset as flux-dev.")],
    height: Annotated[int, typer.Option(help="Of the picture, in pixels.")] = 1024,
    width: Annotated[int, typer.Option(help="Of the picture, in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 28,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures at once.")] = 1,
    controls: Annotated[int, typer.Option(help="How many OminiControl conditions.")] = 0,
    condition: Annotated[int | None, typer.Option(help="Side of a condition [default: the picture's].")] = None,
    cached: Annotated[bool, typer.Option("--cached", help="Independent conditions, which run once.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantize: Annotated[str | None, typer.Option(help="float8 or int8, of the transformer's blocks.")] = None,
    offload: Annotated[str | None, typer.Option(help="encoders or blocks: what rests on the CPU.")] = None,
    components: Annotated[Path | None, typer.Option(help="Folder of what a single file lacks.")] = None,
    device: Annotated[str | None, typer.Option(help="Measure its rate, and tell the time.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell memory and time of drawing before anything is loaded.

    Reads configurations and the headers of files only.
    """
    choices = {"dtype": (dtype, ("float32", "bfloat16", "float16"))}
    choices |= {"quantize": (quantize, (None, "float8", "int8")), "offload": (offload, (None, "encoders", "blocks"))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise typer.BadParameter(f"--{name} is {', '.join(k for k in known if k)}; found {value!r}")
    import torch

    from condit.weights.plan import Wish, measured_rate
    from condit.weights.plan import plan as run

    kind = getattr(torch, dtype)
    side = None if condition is None else (condition, condition)
    mode = "cached" if cached else "joint"
    wish = Wish(height, width, steps, count, controls, side, mode, kind, quantize, offload)  # type: ignore[arg-type]
    rate = None if device is None else measured_rate(device, kind)
    found = run(model, wish, components=components, rate=rate)
    if as_json:
        answer(found.as_json())
        return
    gigabytes = [(p.name, f"{p.parameters:,} parameters", p.loaded) for p in found.parts]
    gigabytes += [("activations", f"about; {found.tokens + found.condition_tokens:,} tokens", found.activations)]
    gigabytes += [("cache", f"{found.condition_tokens:,} tokens of conditions", found.cache)] if found.cache else []
    gigabytes += [("at once", f"with offload={found.offload}" if found.offload else "all of it", found.resident)]
    for name, text, size in gigabytes:
        typer.echo(f"{name:<16} {size / 1e9:9.3f} GB  {text}")
    typer.echo(f"{'a step':<16} {found.operations_a_step / 1e12:9.3f} TFLOP")
    if len(found.parts) == 1:
        say("only the transformer is counted; give a folder or a file for text encoders and autoencoder")
    if found.seconds is not None and found.rate is not None:
        typer.echo(
            f"{'time':<16} {found.seconds:9.1f} s   {steps} steps at {found.rate / 1e12:.3g} TFLOP/s of products"
        )
