"""`condit compare`: a labelled grid of one request over strengths, seeds, adapters or any other option."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from condit.cli.options import (
    ModelOptions,
    OutputOptions,
    ReferenceOptions,
    SamplingOptions,
    StartOptions,
    with_options,
)
from condit.cli.terminal import answer, output_folder

if TYPE_CHECKING:
    from condit.cli.request import Request

# Options that an axis can vary -> the type of a value. The last two vary references.
AXES: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("seed", "steps", "clip-skip"), int),
    **dict.fromkeys(("guidance", "image-guidance", "guidance-rescale", "eta", "change"), float),
    **dict.fromkeys(("prompt", "negative", "sampler"), str),
    "strength": float,
    "adapter": str,
}
MAX_CELLS = 400


@dataclass(frozen=True)
class Axis:
    """The values of one option."""

    name: str
    values: tuple[object, ...]

    def set(self, request: "Request", value: object) -> "Request":
        """The request with this value. A strength is that of every reference, an adapter that of the first."""
        if self.name not in ("strength", "adapter"):
            return replace(request, **{self.name.replace("-", "_"): value})
        if not request.references:
            raise typer.BadParameter(f"{self.name} varies references: give one, as in --style ref.png")
        first, *rest = request.references
        if self.name == "adapter":
            return replace(request, references=(replace(first, use=str(value)), *rest))
        strength = float(str(value))
        return replace(request, references=tuple(replace(r, strength=strength) for r in request.references))

    def label(self, value: object) -> str:
        return f"{value}" if self.name in ("prompt", "adapter") else f"{self.name} {value}"


def read_axis(text: str) -> Axis:
    """'strength=0,0.5,1' -> an axis; values with commas are separated by |."""
    name, equals, values = text.partition("=")
    if not equals or name not in AXES:
        raise typer.BadParameter(f"an axis is NAME=VALUE,VALUE with a NAME of {', '.join(AXES)}; found {text!r}")
    try:
        return Axis(name, tuple(AXES[name](value.strip()) for value in values.split("|" if "|" in values else ",")))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}") from None


@with_options
def compare(
    prompt: Annotated[str, typer.Argument(help="The prompt.", show_default=False)],
    columns: Annotated[
        str | None,
        typer.Option("--columns", metavar="NAME=V,V", help="Across [default: strength=0,0.5,1,1.5, or four seeds]."),
    ] = None,
    rows: Annotated[str | None, typer.Option("--rows", metavar="NAME=V,V", help="Down the grid.")] = None,
    *,
    model: ModelOptions,
    references: ReferenceOptions,
    sampling: SamplingOptions,
    start: StartOptions,
    output: OutputOptions,
) -> None:
    """Compare settings in a labelled grid.

    \b
    condit compare "a rocket" --style ref.png --columns strength=0,0.5,1 --rows seed=0,1
    condit compare "a cat" --style ref.png --columns adapter=tiny/style,tiny/style-tokens
    """
    from condit.cli.generate import request_fields, request_of, studio_of
    from condit.cli.outputs import free_paths, output_paths
    from condit.cli.reference import images_of
    from condit.data.images import load_image, save_image
    from condit.data.progress import progress_bar
    from condit.data.sheets import SheetCell, contact_sheet

    if sampling.count != 1:
        raise typer.BadParameter("--count: every cell is one image; vary seed= instead")
    base = request_of({**request_fields(model, sampling, start, references), "prompt": prompt})
    usual = "strength=0,0.5,1,1.5" if base.references else f"seed={','.join(str(base.seed + i) for i in range(4))}"
    across = read_axis(columns or usual)
    down = Axis("prompt", (prompt,)) if rows is None else read_axis(rows)
    if across.name == down.name:
        raise typer.BadParameter(f"both axes vary {down.name}")
    if len(across.values) * len(down.values) > MAX_CELLS:
        raise typer.BadParameter(f"{len(across.values) * len(down.values)} images; at most {MAX_CELLS} fit a grid")
    try:
        grid = [[across.set(down.set(base, row), column) for column in across.values] for row in down.values]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    (path,) = output_paths(f"compare {prompt}", output.out or output_folder(), sampling.seed, 1)
    (path,) = free_paths([path], output.out, images_of(base.references), force=output.force)
    for file in images_of(base.references):
        load_image(file)
    studio = studio_of(model)()
    cells: list[list[SheetCell | None]] = []
    with progress_bar(len(down.values) * len(across.values), "generating", unit="image") as advance:
        for line in grid:
            cells.append([])
            for request, value in zip(line, across.values, strict=True):
                cells[-1].append(SheetCell(studio.generate(request).images[0], across.label(value)))
                advance()
    sheet = contact_sheet(
        cells, [down.label(value) for value in down.values], title=f"{prompt} ({base.model})", cell=192
    )
    save_image(sheet, path, recipe=None)
    answer({"image": str(path)}) if output.as_json else typer.echo(str(path))
