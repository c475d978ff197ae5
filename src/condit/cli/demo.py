"""`condit demo`: a labelled grid of what the embedded models do, each picture with the command that draws it again."""

import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import condit
from condit.cli.request import USES, Reference, Request, Studio
from condit.data import annotators
from condit.data.icon_sample import sample_icon
from condit.data.images import load_image, save_image
from condit.data.sheets import SheetCell, contact_sheet

if TYPE_CHECKING:
    from condit.drawing.edit import Inversion
    from condit.drawing.pipeline import Pipeline

# The sheet's font has Latin letters only.
IN_CHINESE = {
    "红苹果": "red apple (Chinese)",
    "蘑菇": "mushroom (Chinese)",
    "汽车": "car (Chinese)",
    "螃蟹": "crab (Chinese)",
}
CHANGED = "changed by words\nDiT4Edit"
PROMPTS = ("a red apple", "a penguin", "a guitar", "红苹果")


@dataclass(frozen=True)
class Given:
    """A reference of the demo: an icon of the sample, by style and concept. use: as of a `Reference`."""

    use: str
    style: str
    label: str


@dataclass(frozen=True)
class Row:
    """A row of the grid: what is given, and one picture for every (prompt, strength)."""

    label: str
    given: tuple[Given, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    strengths: tuple[float, ...] = (1.0,)
    model: str = "tiny"


@dataclass(frozen=True)
class Change:
    """The row of the grid that changes an icon by words: what it shows, and what it shall show."""

    given: Given
    source: str
    targets: tuple[str, ...]
    kind: str

    def command(self, path: Path, target: str, output: Path) -> str:
        """The command line that draws it again."""
        words = ["condit", "edit", str(path), self.source, target, "--type", self.kind, "-o", str(output)]
        return shlex.join(words)


CHANGES = (
    Change(
        Given("source", "noto", "red apple"),
        "a red apple, noto style",
        ("a green apple, noto style", "a yellow apple, noto style"),
        "attribute",
    ),
)
ROWS = (
    Row("plain\ntext to image"),
    Row("+ style\nof the reference", (Given("style", "fluent-emoji-high-contrast", "key"),)),
    Row("+ style\nof another", (Given("style", "fluent-emoji-3d", "tulip"),), PROMPTS[:3]),
    Row("+ style\nof a third", (Given("style", "emojione-monotone", "guitar"),), PROMPTS[:3]),
    Row(
        "+ subject\nas another hand drew it",
        (Given("subject", "fluent-emoji-flat", "automobile"),),
        ("an automobile", "an automobile, noto style", "an automobile, emojione monochrome style", "汽车"),
    ),
    Row(
        "+ edges\nof the reference",
        (Given("edges", "noto", "mushroom"),),
        (
            "a mushroom",
            "a mushroom, fluent flat style",
            "a mushroom, fluent 3d style",
            "蘑菇",
        ),
    ),
    Row(
        "gray -> colour",
        (Given("gray", "fluent-emoji-flat", "automobile"),),
        ("an automobile", "a red car", "an automobile, twemoji style"),
    ),
    Row(
        "all together\nstyle + subject + edges",
        (
            Given("style", "fluent-emoji-3d", "tulip"),
            Given("subject", "twemoji", "crab"),
            Given("edges", "fluent-emoji-flat", "crab"),
        ),
        ("a crab", "a crab, fluent 3d style", "螃蟹"),
    ),
    Row(
        "style strength\n0, 0.5, 1, 1.5",
        (Given("style", "fluent-emoji-high-contrast", "key"),),
        ("a rocket",),
        (0.0, 0.5, 1.0, 1.5),
    ),
    Row(
        "UNet: style\nby IP-Adapter",
        (Given("style", "fluent-emoji-high-contrast", "key"),),
        PROMPTS[:3],
        model="tiny-unet",
    ),
    Row(
        "UNet: style\nby DEADiff",
        (Given("tiny-unet/deadiff", "fluent-emoji-high-contrast", "key"),),
        PROMPTS[:3],
        model="tiny-unet",
    ),
)


def draw_demo(folder: Path, *, seed: int = 0, tell: Callable[[str], None] = lambda text: None) -> dict[str, object]:
    """Writes folder/demo.png, the pictures in folder/demo and their references in folder/references.
    tell gets one line a picture: its command and its time. Returns paths, commands and seconds."""
    start = time.perf_counter()
    rows = drawable(ROWS, tell)
    paths = {given: write_reference(given, folder) for row in rows for given in row.given}
    studios = {model: Studio(model) for model in {"tiny", *(row.model for row in rows)}}
    calls: list[dict[str, object]] = []
    cells: list[list[SheetCell | None]] = []
    for number, row in enumerate(rows):
        line: list[SheetCell | None] = [given_cell(given, paths[given]) for given in row.given] or [
            None
        ]  # columns align
        for column, request in enumerate(requests(row, paths, seed)):
            output = folder / "demo" / f"{number}-{column}.png"
            image, seconds = draw_one(studios[row.model], request, output)
            command = request.command(output)
            tell(f"{command}  # {seconds:.1f} s")
            calls.append({"command": command, "seconds": round(seconds, 2), "path": str(output)})
            caption = f"strength {request.references[0].strength:g}" if len(row.strengths) > 1 else request.prompt
            line.append(SheetCell(image, IN_CHINESE.get(caption, caption)))
        cells.append(line)
    tiny = studios["tiny"].pipe
    assert isinstance(tiny, condit.Pipeline)
    for change in CHANGES:
        path = write_reference(change.given, folder)
        cells.append([given_cell(change.given, path), *draw_changes(tiny, change, path, folder, calls, tell)])
    labels = [*(row.label for row in rows), *(CHANGED for _ in CHANGES)]
    title = f"condit {condit.__version__}, embedded models, seed {seed}; orange frames are references"
    grid = save_image(contact_sheet(cells, labels, title=title), folder / "demo.png")
    seconds = round(time.perf_counter() - start, 1)
    tell(f"{len(calls)} pictures in {seconds} s")
    return {"grid": str(grid), "calls": calls, "seconds": seconds}


def drawable(rows: Iterable[Row], tell: Callable[[str], None]) -> list[Row]:
    """The rows whose adapters are here; the others are told."""
    from condit.weights.catalog import MODELS

    kept = []
    for row in rows:
        uses = (given.use for given in row.given)
        missing = sorted({row.model, *(f"{row.model}/{use}" if use in USES else use for use in uses)} - set(MODELS))
        if missing:
            tell(f"left out: {row.label.splitlines()[0]} (no {', '.join(missing)})")
        else:
            kept.append(row)
    return kept


def requests(row: Row, paths: dict[Given, Path], seed: int) -> list[Request]:
    """One request for every prompt and strength; a sweep changes the first reference."""
    return [
        Request(
            prompt,
            row.model,
            tuple(
                Reference(given.use, str(paths[given]), strength if index == 0 else 1.0)
                for index, given in enumerate(row.given)
            ),
            seed=seed,
        )
        for prompt in row.prompts
        for strength in row.strengths
    ]


def draw_one(studio: Studio, request: Request, output: Path) -> tuple[Image.Image, float]:
    """Draws and saves one picture as `condit generate` does; returns it with its seconds."""
    start = time.perf_counter()
    drawing = studio.draw(request)
    save_image(drawing.images[0], output, recipe=drawing.recipes[0], parameters=drawing.parameters[0])
    return drawing.images[0], time.perf_counter() - start


def draw_changes(
    pipe: "Pipeline",
    change: Change,
    path: Path,
    folder: Path,
    calls: list[dict[str, object]],
    tell: Callable[[str], None],
) -> list[SheetCell | None]:
    """The picture inverted once and drawn again for each target, as `condit edit` does; adds to `calls`."""
    from condit.controls.dit4edit import PRESETS

    cells: list[SheetCell | None] = []
    known: Inversion | None = None
    for column, target in enumerate(change.targets):
        start = time.perf_counter()
        result = pipe.edit(known or path, change.source, target, controls=[PRESETS[change.kind]])
        known = result.inversion
        output = save_image(result.images[0], folder / "demo" / f"change-{column}.png")
        seconds, command = time.perf_counter() - start, change.command(path, target, output)
        tell(f"{command}  # {seconds:.1f} s")
        calls.append({"command": command, "seconds": round(seconds, 2), "path": str(output)})
        cells.append(SheetCell(result.images[0], target))
    return cells


def write_reference(given: Given, folder: Path) -> Path:
    """The icon as a file with its alpha, so that the printed commands find it."""
    name = f"{given.label.replace(' ', '-')}-{given.style}.png"
    return save_image(sample_icon(given.style, given.label), folder / "references" / name)


def given_cell(given: Given, path: Path) -> SheetCell:
    """The reference as its adapter sees it: the lines for edges, gray for gray."""
    draw = {"edges": annotators.lines, "gray": annotators.gray}.get(given.use, load_image)
    return SheetCell(draw(path), given.use, is_input=True)
