"""Commands that generate images (demo, generate, replay), make conditions (annotate) and estimate costs (plan)."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from condit.cli.options import Model, Out, Sampling, with_options
from condit.cli.terminal import Debug, Json, Seed, answer, output_folder, say, waiting
from condit.cli.uses import OPTIONS

if TYPE_CHECKING:
    from condit.cli.request import Reference, Request


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


@dataclass(frozen=True)
class References:
    """References of `condit generate`."""

    style: Annotated[list[str] | None, typer.Option("--style", metavar="REF[:S]", help=OPTIONS["style"].help)] = None
    subject: Annotated[list[str] | None, typer.Option("--subject", metavar="REF[:S]", help=OPTIONS["subject"].help)] = (
        None
    )
    edges: Annotated[list[str] | None, typer.Option("--edges", metavar="IMG[:S]", help=OPTIONS["edges"].help)] = None
    edges_map: Annotated[
        list[str] | None, typer.Option("--edges-map", metavar="MAP[:S]", help=OPTIONS["edges-map"].help)
    ] = None
    gray: Annotated[list[str] | None, typer.Option("--gray", metavar="IMG[:S]", help=OPTIONS["gray"].help)] = None
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="ADAPTER=REF[:S]",
            help="An adapter by name, file or folder, or your own control: FILE.py:NAME.",
        ),
    ] = None
    strength: Annotated[float, typer.Option(help="Strength of references without their own S.")] = 1.0

    def read(self) -> "list[Reference]":
        """The references of a request."""
        from condit.cli.request import Reference

        references = [
            Reference(row.use, *parse_reference(value, self.strength), ready=row.ready)
            for option, row in OPTIONS.items()
            for value in getattr(self, option.replace("-", "_")) or ()
        ]
        for value in self.control or ():
            adapter, equals, reference = value.partition("=")
            if not equals or not adapter or not reference:
                raise typer.BadParameter(f"--control takes ADAPTER=REF[:S], as in tiny/style=ref.png; found {value!r}")
            references.append(Reference(adapter, *parse_reference(reference, self.strength)))
        return references


@dataclass(frozen=True)
class ImageSampling(Sampling):
    """How `condit generate` samples: fields of a request."""

    image_guidance: Annotated[
        float | None, typer.Option(help="Separate guidance scale of the references [default: none].")
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, dpm++, euler, euler-ancestral, ...; Stable Diffusion only [default: the model's]."),
    ] = None
    eta: Annotated[
        float | None,
        typer.Option(help="Eta of DDIM: the share of fresh noise in each step, 0 to 1 [default: the model's]."),
    ] = None
    height: Annotated[int | None, typer.Option(help="Height in pixels [default: the model's].")] = None
    width: Annotated[int | None, typer.Option(help="Width in pixels [default: the model's].")] = None
    image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Image to image: start from this image (Stable Diffusion)."),
    ] = None
    mask: Annotated[
        str | None, typer.Option(metavar="FILE", help="Inpainting: repaint --image where this mask is white.")
    ] = None
    change: Annotated[float | None, typer.Option(help="How much of --image to change, up to 1 [default: 0.8].")] = None
    count: Annotated[int, typer.Option("--count", "-n", help="Number of images.")] = 1


@with_options
def generate(
    prompt: Annotated[
        str,
        typer.Argument(help="The prompt, in English or Chinese; for DiT and DiffiT a class.", show_default=False),
    ],
    references: References,
    sampling: ImageSampling,
    model: Model = "tiny",
    out: Out = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Do not store the recipe in the PNG.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate images from a prompt and references.

    References give the style, the subject or the edges of the image, and can be combined.
    A reference can have its own strength: --style ref.png:0.6
    """
    from condit.cli.request import Request
    from condit.data.images import load_image

    settings = {name: value for name, value in vars(sampling).items() if name != "device"}
    try:
        request = Request(prompt, model, tuple(references.read()), **settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    paths = output_paths(request.prompt, out, request.seed, request.count, no_metadata)
    inputs = [reference.path for reference in request.references] + [p for p in (request.image, request.mask) if p]
    for path in inputs:  # a broken image raises before the model is loaded, which takes seconds
        load_image(path)
    with_recipe, indices = not no_metadata, range(request.count)
    generate_and_save(request, paths, indices, with_recipe=with_recipe, as_json=as_json, device=sampling.device)


def parse_reference(value: str, strength: float) -> tuple[str, float]:
    """'ref.png:0.6' -> path and strength, unless a file has this name."""
    path, colon, tail = value.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", tail) and not Path(value).exists():
        return path, float(tail)
    return value, strength


def output_paths(prompt: str, out: Path | None, seed: int, count: int, no_metadata: bool = False) -> list[Path]:
    """The paths of the images: -o itself, with the seed before its suffix for more than one image, or names in a
    folder."""
    if out is None or out.is_dir() or not out.suffix:
        words = re.sub(r"[^\w]+", "-", prompt).strip("-")[:40].strip("-") or "image"
        return [(out or output_folder()) / f"{words}-{seed + index}.png" for index in range(count)]
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise typer.BadParameter(f"-o {out}: expected a name that ends in .png, .jpg or .webp, or a folder")
    if out.suffix.lower() != ".png" and not no_metadata:
        raise typer.BadParameter(f"-o {out}: only a PNG stores its recipe; use .png, or add --no-metadata")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed + index}") for index in range(count)]


def generate_and_save(
    request: "Request",
    paths: Sequence[Path],
    indices: Sequence[int],
    *,
    with_recipe: bool,
    as_json: bool,
    device: str | None = None,
) -> Sequence[dict[str, object]]:
    """Generates the request's images, writes those of `indices` to `paths`, and returns the recipes of all of them."""
    from condit.cli.request import Studio
    from condit.data.images import save_image

    start = time.perf_counter()
    with waiting(f"loading {request.model}"):
        studio = Studio(request.model, device)
    with waiting("generating"):
        generated = studio.generate(request)
    for path, index in zip(paths, indices, strict=True):
        recipe, parameters = generated.recipes[index], generated.parameters[index]
        save_image(
            generated.images[index],
            path,
            recipe=recipe if with_recipe else None,
            parameters=parameters if with_recipe else None,
        )
    seconds = round(time.perf_counter() - start, 2)
    if as_json:
        images = [{"path": str(path), "seed": request.seed + i} for path, i in zip(paths, indices, strict=True)]
        answer({"images": images, "seconds": seconds, "recipe": generated.recipes[0]})
    else:
        say(f"generated in {seconds} s")
        for path in paths:
            typer.echo(str(path))
    return generated.recipes


def replay(
    image: Annotated[Path, typer.Argument(help="A PNG generated by condit.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output file [default: next to the PNG, with -replay].")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="FILE.py:NAME", help="Your own code that the recipe uses."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reproduce a PNG from the recipe stored in it.

    Reports whether the image is identical, and what has changed since it was generated.
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
    recipes = generate_and_save(
        request, [target], [index], with_recipe=target.suffix.lower() == ".png", as_json=as_json
    )
    for difference in differences(recipe, recipes[index]):
        say(f"warning: {difference}")
    say(
        "the image is identical"
        if before.tobytes() == load_image(target).tobytes()
        else "the image differs from the one in the file"
    )


def annotate(
    image: Annotated[Path, typer.Argument(help="An image.", show_default=False)],
    kind: Annotated[str, typer.Argument(help="canny, edges, lines, soft_edges, gray, blur, blur-5, blur-10 or depth.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The output file [default: next to the image, with the kind].")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Resize to this height first; lines depend on the size.")] = None,
    width: Annotated[int | None, typer.Option(help="Resize to this width first.")] = None,
    debug: Debug = False,
) -> None:
    """Make a condition from an image: edges, gray, blur or depth.

    depth needs the weights of a depth network, which condit does not include.
    """
    from condit.data.images import load_image, save_image
    from condit.drawing.references import ANNOTATORS

    if kind not in ANNOTATORS:
        raise typer.BadParameter(f"expected one of {', '.join(ANNOTATORS)}; found {kind!r}")
    source = load_image(image, mode="RGBA" if kind in ("edges", "lines", "soft_edges") else "RGB")
    if height is not None or width is not None:
        size = width or source.width, height or source.height
        if min(size) < 1:
            raise typer.BadParameter("--height and --width must be at least 1")
        source = source.resize(size)
    target = out or image.with_name(f"{image.stem}-{kind}.png")
    typer.echo(str(save_image(ANNOTATORS[kind](source), target)))


@dataclass(frozen=True)
class Workload:
    """A call whose costs `condit plan` estimates."""

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
    model: Annotated[str, typer.Argument(help="A folder or file of FLUX.1, tiny, or a preset such as flux-dev.")],
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
    gigabytes = [(p.name, f"{p.parameters:,} parameters", p.loaded) for p in estimate.parts]
    gigabytes += [
        ("activations", f"estimated; {estimate.tokens + estimate.condition_tokens:,} tokens", estimate.activations)
    ]
    gigabytes += (
        [("cache", f"{estimate.condition_tokens:,} tokens of conditions", estimate.cache)] if estimate.cache else []
    )
    gigabytes += [
        (
            "peak",
            f"with offload={estimate.offload}" if estimate.offload else "everything on the device",
            estimate.resident,
        )
    ]
    for name, text, size in gigabytes:
        typer.echo(f"{name:<16} {size / 1e9:9.3f} GB  {text}")
    typer.echo(f"{'a step':<16} {estimate.operations_a_step / 1e12:9.3f} TFLOP")
    if len(estimate.parts) == 1:
        say("this counts the transformer only; name a folder or a file to include text encoders and autoencoder")
    if estimate.seconds is not None and estimate.rate is not None:
        typer.echo(f"{'time':<16} {estimate.seconds:9.1f} s   {work.steps} steps at {estimate.rate / 1e12:.3g} TFLOP/s")
