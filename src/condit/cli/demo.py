"""`condit demo`: a labelled grid of images by the embedded models, with the commands that reproduce them."""

import shlex
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import condit
from condit.cli.request import Reference, Request, Studio
from condit.cli.uses import USES, adapter_name
from condit.data.icon_sample import sample_icon
from condit.data.images import load_image, save_image
from condit.data.sheets import SheetCell, contact_sheet
from condit.drawing.references import ANNOTATORS

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
class DemoIcon:
    """A reference of the demo: an icon of the sample, by style and concept. use: see `Reference`."""

    use: str
    style: str
    label: str


@dataclass(frozen=True)
class DemoRow:
    """A row of the grid: its references, and one image for every (prompt, strength)."""

    label: str
    icons: tuple[DemoIcon, ...] = ()
    prompts: Sequence[str] = PROMPTS
    strengths: Sequence[float] = (1.0,)
    model: str = "tiny"


@dataclass(frozen=True)
class Change:
    """A row of the grid that edits an icon: the prompts of the icon and of its edits."""

    icon: DemoIcon
    source: str
    targets: Sequence[str]
    kind: str

    def command(self, path: Path, target: str, output: Path) -> str:
        """The command that reproduces the edit."""
        words = ["condit", "edit", str(path), self.source, target, "--type", self.kind, "-o", str(output)]
        return shlex.join(words)


def read_rows() -> tuple[tuple[DemoRow, ...], tuple[Change, ...]]:
    """The tables of demo.toml."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    rows = (DemoRow(**row | {"icons": tuple(DemoIcon(**i) for i in row.get("icons", ()))}) for row in tables["row"])
    return tuple(rows), tuple(Change(**one | {"icon": DemoIcon(**one["icon"])}) for one in tables["change"])


ROWS, CHANGES = read_rows()


def generate_demo(folder: Path, *, seed: int = 0, tell: Callable[[str], None] = lambda text: None) -> dict[str, object]:
    """Writes folder/demo.png, its images to folder/demo and their references to folder/references.
    tell receives one line per image: its command and its time. Returns paths, commands and seconds."""
    start = time.perf_counter()
    rows = available(ROWS, tell)
    paths = {icon: write_reference(icon, folder) for row in rows for icon in row.icons}
    studios = {model: Studio(model) for model in {"tiny", *(row.model for row in rows)}}
    calls: list[dict[str, object]] = []
    cells: list[list[SheetCell | None]] = []
    for number, row in enumerate(rows):
        line: list[SheetCell | None] = [reference_cell(icon, paths[icon]) for icon in row.icons]
        line = line or [None]  # columns align
        for column, request in enumerate(requests(row, paths, seed)):
            output = folder / "demo" / f"{number}-{column}.png"
            image, seconds = generate_one(studios[row.model], request, output)
            command = request.command(output)
            tell(f"{command}  # {seconds:.1f} s")
            calls.append({"command": command, "seconds": round(seconds, 2), "path": str(output)})
            caption = f"strength {request.references[0].strength:g}" if len(row.strengths) > 1 else request.prompt
            line.append(SheetCell(image, IN_CHINESE.get(caption, caption)))
        cells.append(line)
    tiny = studios["tiny"].pipe
    assert isinstance(tiny, condit.Pipeline)
    for change in CHANGES:
        path = write_reference(change.icon, folder)
        cells.append([reference_cell(change.icon, path), *generate_edits(tiny, change, path, folder, calls, tell)])
    labels = [*(row.label for row in rows), *(CHANGED for _ in CHANGES)]
    title = f"condit {condit.__version__}, embedded models, seed {seed}; orange frames are references"
    grid = save_image(contact_sheet(cells, labels, title=title), folder / "demo.png")
    seconds = round(time.perf_counter() - start, 1)
    tell(f"{len(calls)} images in {seconds} s")
    return {"grid": str(grid), "calls": calls, "seconds": seconds}


def available(rows: Iterable[DemoRow], tell: Callable[[str], None]) -> list[DemoRow]:
    """The rows whose model and adapters are installed; `tell` receives the names of the others."""
    from condit.weights.catalog import MODELS

    kept = []
    for row in rows:
        names = {row.model, *(adapter_name(row.model, icon.use) for icon in row.icons)}
        missing = sorted(names - set(MODELS))
        if missing:
            tell(f"left out: {row.label.splitlines()[0]} (no {', '.join(missing)})")
        else:
            kept.append(row)
    return kept


def requests(row: DemoRow, paths: dict[DemoIcon, Path], seed: int) -> list[Request]:
    """One request for every prompt and strength; a sweep changes the first reference."""
    return [
        Request(
            prompt,
            row.model,
            tuple(
                Reference(icon.use, str(paths[icon]), strength if index == 0 else 1.0)
                for index, icon in enumerate(row.icons)
            ),
            seed=seed,
        )
        for prompt in row.prompts
        for strength in row.strengths
    ]


def generate_one(studio: Studio, request: Request, output: Path) -> tuple[Image.Image, float]:
    """Generates and saves one image as `condit generate` does; returns it with its seconds."""
    start = time.perf_counter()
    generated = studio.generate(request)
    save_image(generated.images[0], output, recipe=generated.recipes[0], parameters=generated.parameters[0])
    return generated.images[0], time.perf_counter() - start


def generate_edits(
    pipe: "Pipeline",
    change: Change,
    path: Path,
    folder: Path,
    calls: list[dict[str, object]],
    tell: Callable[[str], None],
) -> list[SheetCell | None]:
    """Inverts the image once and edits it for each target, as `condit edit` does. Appends to `calls`."""
    from condit.controls.dit4edit import PRESETS

    cells: list[SheetCell | None] = []
    inversion: Inversion | None = None
    for column, target in enumerate(change.targets):
        start = time.perf_counter()
        result = pipe.edit(inversion or path, change.source, target, controls=[PRESETS[change.kind]])
        inversion = result.inversion
        output = save_image(result.images[0], folder / "demo" / f"change-{column}.png")
        seconds, command = time.perf_counter() - start, change.command(path, target, output)
        tell(f"{command}  # {seconds:.1f} s")
        calls.append({"command": command, "seconds": round(seconds, 2), "path": str(output)})
        cells.append(SheetCell(result.images[0], target))
    return cells


def write_reference(icon: DemoIcon, folder: Path) -> Path:
    """Writes the icon, with its alpha, to the file that the printed commands read."""
    name = f"{icon.label.replace(' ', '-')}-{icon.style}.png"
    return save_image(sample_icon(icon.style, icon.label), folder / "references" / name)


def reference_cell(icon: DemoIcon, path: Path) -> SheetCell:
    """The reference after the adapter's annotator: lines for edges, gray for gray."""
    annotator = USES[icon.use].annotator if icon.use in USES else None
    image = load_image(path) if annotator is None else ANNOTATORS[annotator](path)
    return SheetCell(image, icon.use, is_input=True)
