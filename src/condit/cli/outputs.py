"""Where commands write: never over their own inputs, and over an earlier file only with --force."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condit.cli.terminal import answer, output_folder, say

if TYPE_CHECKING:
    from condit.cli.request import Request, Studio

Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]


def output_paths(prompt: str, out: Path | None, seed: int, count: int) -> list[Path]:
    """The paths of the images: -o itself, with the seed before its suffix for more than one image, or names in a
    folder."""
    if out is None or out.is_dir() or not out.suffix:
        return [(out or output_folder()) / f"{name_of(prompt)}-{seed + index}.png" for index in range(count)]
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".svg"):
        raise typer.BadParameter(f"-o {out}: expected a name that ends in .png, .jpg, .webp or .svg, or a folder")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed + index}") for index in range(count)]


def name_of(prompt: str) -> str:
    """The words of a prompt as part of a file's name."""
    return re.sub(r"[^\w]+", "-", prompt).strip("-")[:40].strip("-") or "image"


def free_paths(
    paths: Sequence[Path], out: Path | None, inputs: Iterable[str | Path], *, force: bool = False
) -> list[Path]:
    """The paths to write to. A name that condit chose goes on counting where its file exists: fox-0.png, fox-0-2.png.
    Wrong usage: a file that `out` names and that exists, unless `force`; and always a file that the command reads."""
    sources = [Path(path) for path in inputs if Path(path).is_file()]
    named = out is not None and bool(out.suffix) and not out.is_dir()
    free: list[Path] = []
    for path in paths:
        if not named and not force:
            path = next(p for p in numbered(path) if not p.exists() and p not in free)
        if path.exists() and any(path.samefile(source) for source in sources):
            raise typer.BadParameter(f"{path} is read by this command and would be lost. Choose another name with -o")
        if path.exists() and not force:
            raise typer.BadParameter(f"{path} exists. Add --force to replace it, or choose another name with -o")
        free.append(path)
    return free


def numbered(path: Path) -> Iterator[Path]:
    """a.png, a-2.png, a-3.png, ..."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{number}") for number in count(2))


@dataclass(frozen=True)
class SavedImages:
    """The images of a request on disk, the recipes of all of its images, and the seconds that it took."""

    paths: Sequence[Path]
    seeds: Sequence[int]
    recipes: Sequence[dict[str, object]]
    seconds: float


def generate_and_save(
    request: Request,
    paths: Sequence[Path],
    indices: Sequence[int] | None,
    *,
    with_recipe: bool,
    load: Callable[[], Studio],
) -> SavedImages:
    """Generates the request's images and writes those of `indices` to `paths`; None: the best."""
    from condit.data.images import check_output, save_image

    for path in paths:
        check_output(path)
    start, studio = time.perf_counter(), load()
    generated = studio.generate(request, progress=True)
    if indices is None:
        from condit.drawing.candidates import best

        styles = [r.path for r in request.references if r.use == "style"]
        indices = best(generated.images, request.prompt, len(paths), styles)
    for path, index in zip(paths, indices, strict=True):
        recipe, parameters = generated.recipes[index], generated.parameters[index]
        save_image(
            generated.images[index],
            path,
            recipe=recipe if with_recipe else None,
            parameters=parameters if with_recipe else None,
        )
    seeds = [request.seed + index for index in indices]
    return SavedImages(paths, seeds, generated.recipes, round(time.perf_counter() - start, 2))


def report(saved: Sequence[SavedImages], *, as_json: bool) -> None:
    """Prints where the images are."""
    seconds = round(sum(each.seconds for each in saved), 2)
    if as_json:
        images = [
            {"path": str(path), "seed": seed}
            for each in saved
            for path, seed in zip(each.paths, each.seeds, strict=True)
        ]
        answer({"images": images, "seconds": seconds, "recipe": saved[0].recipes[0]})
        return
    say(f"generated in {seconds} s")
    for each in saved:
        for path in each.paths:
            typer.echo(str(path))
