"""`condit bench style`: every method of style transfer on every embedded model, with the same prompts and references.

Cells are held-out combinations of a prompt's concept and a reference's style, or every prompt with every reference of
one's own folder. Drawing, measures and comparisons are those of `style.py`; docs/papers/style-evaluation.md explains
them.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from condit.data.files import atomic_write
from condit.data.images import load_image, save_image
from condit.data.sheets import SheetCell, contact_sheet
from condit.rulers.report import FolderSettings, evaluate_folder
from condit_lab.icons.world import Icon, IconWorld
from condit_lab.suites import bench_examples as examples
from condit_lab.suites import style_rulers as rulers
from condit_lab.suites.sets import Cell, choose_cells
from condit_lab.suites.style import PROBE, Measured, Protocol, measure_styles
from condit_lab.suites.style_methods import BENCH, to_image
from condit_lab.suites.style_report import best_strength, write_page
from condit_lab.suites.tiny import write_between

log = logging.getLogger(__name__)

OWN, SIDE, SHOWN = "own", 128, 6  # style and split of one's own references; pixels of an icon; columns of the picture
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The columns of the table: a measure and its title.
COLUMNS = {
    rulers.SCORE: "style",
    rulers.LEAKAGE: "leakage",
    rulers.ALIGNMENT: "text",
    rulers.LIKENESS: "likeness to the reference",
    rulers.REALISTIC: "realistic",
}
PARTNERS = ("content_file_name", "style_file_name")
AT_EQUAL_STYLE = (rulers.LEAKAGE, rulers.ALIGNMENT)


@dataclass(frozen=True)
class WithReferences(IconWorld):
    """A world with one's own references behind its icons."""

    own: tuple[np.ndarray, ...] = ()

    def rgba(self, index: int) -> np.ndarray:
        first = len(self.icons) - len(self.own)
        return super().rgba(index) if index < first else self.own[index - first]


def bench_style(
    out: str | Path,
    protocol: Protocol,
    *,
    references: int = 8,
    own: str | Path | None = None,
    data: str | Path | None = None,
    adain: str | Path | None = None,
    report: bool = False,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Draws, measures and writes bench.json, bench.md (the table), bench.png (the picture), examples.png and .md, the
    folders of `write_folders` and index.html; returns what stands in bench.json. protocol.count: pictures of each
    method. references: how many styles of the icon world; own: a folder of one's own references instead, whose file
    names say what they show. report: also every ruler of `condit evaluate folder`, as reports/MODEL."""
    folder, verb = Path(out), f"bench style --references {references}"
    pairs, table = partial(held_out_pairs, references=references), BENCH
    if own is not None:
        verb, pairs = "bench style --own DIR", partial(own_pairs, folder=Path(own))
        table = tuple(method for method in BENCH if method.name not in ("real", "words"))
    run = measure_styles(folder, protocol, data=data, adain=adain, table=table, pairs=pairs, verb=verb, tell=tell)
    text = json.dumps(run.result, indent=1, allow_nan=False) + "\n"
    atomic_write(folder / "bench.json", lambda path: path.write_text(text, encoding="utf-8"))
    atomic_write(folder / "bench.md", lambda path: path.write_text(markdown(run.result), encoding="utf-8"))
    save_image(picture(run), folder / "bench.png")
    if (shown := examples.picture(run)) is not None:
        save_image(shown, folder / "examples.png")
        text_of = examples.markdown(run, examples.fid_by_count(run.bank))
        atomic_write(folder / "examples.md", lambda path: path.write_text(text_of, encoding="utf-8"))
    write_folders(run, folder / "folders")
    if report:
        write_reports(run.result, folder)
    write_page(folder, run.result, run.images, run.values, run.given)
    return run.result


# Prompts and references


def held_out_pairs(
    world: IconWorld, protocol: Protocol, *, references: int
) -> tuple[IconWorld, list[Cell], list[Cell]]:
    """Cells of the held-out combinations of some styles, each style with one reference, in turn; and others for the
    block probe. Raises ValueError where the world has too few."""
    by_style: dict[str, list[Cell]] = {}
    for cell in choose_cells(world, protocol.split, len(world.icons), protocol.seed):
        by_style.setdefault(world.icons[cell.icon].style, []).append(cell)
    styles = sorted(by_style, key=lambda style: (-len(by_style[style]), style))[:references]
    chosen = []
    for style in styles:
        shown = random.Random(f"bench/{protocol.seed}/{style}").choice(by_style[style]).unseen
        other = [c for c in by_style[style] if world.icons[c.icon].base != world.icons[shown].base]
        chosen.append([replace(cell, unseen=shown) for cell in other])
    cells = [cell for cell in chain.from_iterable(zip_longest(*chosen)) if cell is not None]
    if len(styles) < references or len(cells) < min(protocol.count, 2):
        raise ValueError(
            f"This world has {len(styles)} styles with held-out icons and {len(cells)} pairs; found {references} "
            "references. Ask for fewer, or build the whole world: condit data icons."
        )
    count = min(protocol.count, max(len(cells) - PROBE, len(cells) // 2))
    return world, cells[:count], cells[count : count + PROBE]


def own_pairs(world: IconWorld, protocol: Protocol, *, folder: Path) -> tuple[IconWorld, list[Cell], list[Cell]]:
    """Every reference of a folder with concepts of the world in turn, and the others for the block probe."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{folder}: expected a folder of references ({', '.join(SUFFIXES)}); found none.")
    images = [load_image(file, mode="RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for file in files]
    icons = [
        Icon(OWN, file.stem, f"{OWN}-{i}", f"{OWN}-{i}", words_of(file.stem), OWN, OWN, True, "")
        for i, file in enumerate(files)
    ]
    first = len(world.icons)
    prompts = choose_cells(world, protocol.split, len(world.icons), protocol.seed)
    prompts = list({world.icons[cell.icon].base: cell for cell in prompts}.values())
    cells = [replace(cell, unseen=first + i) for cell in prompts for i in range(len(files))]
    count = min(protocol.count, max(len(cells) - PROBE, len(cells) // 2))
    extended = WithReferences(**{**vars(world), "icons": [*world.icons, *icons]}, own=tuple(map(np.array, images)))
    return extended, cells[:count], cells[count : count + PROBE]


def words_of(stem: str) -> str:
    """What a file name says: "red-apple_2" -> "red apple"."""
    return " ".join(word for word in stem.replace("_", " ").replace("-", " ").split() if not word.isdigit())


# What the run leaves


def write_folders(run: Measured, folder: Path) -> None:
    """The pictures as `condit evaluate folder` reads them: `style`, and for each model MODEL/METHOD/STRENGTH/NAME.png,
    with MODEL/none for those without a control and MODEL/metadata.jsonl for the prompts and references."""
    given, names = run.given["style"], [f"{i:04}.png" for i in range(len(run.given["style"].wanted))]
    known = [{} if icon.style == OWN else {"style_text": icon.style, "style_group": icon.style} for icon in given.icons]
    shown = [{"file_name": name, "text": icon.label} for name, icon in zip(names, given.icons, strict=True)]
    write_rows(folder / "style", [row | style for row, style in zip(shown, known, strict=True)])
    for name, reference in zip(names, given.references, strict=True):
        save_image(to_image(reference), folder / "style" / name)
    for method in run.result["methods"]:
        model, plain = folder / method["model"], method["name"] == method["blank"]
        for strength in sorted({s for name, s in run.images if name == method["name"]}):
            place = model / method["name"] / (f"{strength:g}" if method["name"] in run.result["swept"] else "")
            for name, image in zip(names, run.images[method["name"], strength], strict=True):
                save_image(to_image(image), (model / "none" if plain else place) / name)
        prompts = [{"file_name": name, "text": icon.label} for name, icon in zip(names, given.wanted, strict=True)]
        write_rows(model, [row | dict.fromkeys(PARTNERS, row["file_name"]) for row in prompts])


def write_reports(result: Mapping[str, Any], folder: Path) -> None:
    """reports/MODEL of the pictures in `folders`, each model against its own adapter's curve."""
    for model in dict.fromkeys(method["model"] for method in result["methods"]):
        pictures = folder / "folders" / model
        baseline = next((m["baseline"] for m in result["methods"] if m["model"] == model and m["baseline"]), None)
        settings = FolderSettings(blank="none", baseline=baseline)
        evaluate_folder(pictures, folder / "reports" / model, pictures / "none", folder / "folders" / "style", settings)


def write_rows(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(folder / "metadata.jsonl", lambda path: path.write_text(text, encoding="utf-8"))


# The table and the picture


def markdown(result: Mapping[str, Any]) -> str:
    """The table: a method at a strength a row, by model; its differences to the model's own IP-Adapter at equal
    style."""
    gaps = {(x["method"], x["strength"], x["measure"]): x for x in result["comparisons"]}
    figures = {(x["method"], x["strength"], x["measure"]): x for x in result["rows"]}
    titles = [*COLUMNS.values(), *(f"{COLUMNS[m]} at equal style" for m in AT_EQUAL_STYLE)]
    lines = [
        f"`{result['command']}`: n = {result['n']} pictures a row, {result['concepts']} concepts in {result['styles']} "
        f"styles, {result['protocol']['steps']} steps. In brackets: 95 %, bootstrap over concepts.",
        "",
        f"| model | method | strength | {' | '.join(titles)} |",
        f"|---|---|---|{'---|' * len(titles)}",
    ]
    for method in by_model(result):
        for strength in sorted({s for name, s, _ in figures if name == method["name"]}):
            key = method["name"], strength
            cells = [_figure(figures.get((*key, measure))) for measure in COLUMNS]
            cells += [_gap(gaps.get((*key, measure))) for measure in AT_EQUAL_STYLE]
            at = f"{strength:g}" if method["name"] in result["swept"] else ""
            lines.append(f"| {method['model']} | {title(method)} | {at} | {' | '.join(cells)} |")
    return (
        "\n".join([*lines, "", *(f"Left out: {x['method']} ({x['why']})." for x in result["skipped"])]).rstrip() + "\n"
    )


def by_model(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods, those of a model together."""
    models = list(dict.fromkeys(method["model"] for method in result["methods"]))
    return sorted(result["methods"], key=lambda method: models.index(method["model"]))


def title(method: Mapping[str, Any]) -> str:
    """What a method is, without its model."""
    return method["what"].removeprefix("UNet, ").removeprefix("PixArt, ")


def _figure(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _gap(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    gap = entry["gap"]
    if gap["difference"] is None:
        return f"{gap['side']} the curve"
    return f"{gap['difference']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f}) {entry['verdict']}"


def picture(run: Measured, columns: int = SHOWN) -> Image.Image:
    """The same prompts and references under every method, each at its strength with the most style."""
    given = run.given["style"]
    count = min(columns, len(given.wanted))
    rows = [[SheetCell(to_image(given.references[i]), given.icons[i].label, is_input=True) for i in range(count)]]
    labels = ["reference"]
    for method in by_model(run.result):
        if method["name"] == "copy":
            continue
        strength = best_strength(run.values, method["name"])
        images = run.images[method["name"], strength]
        captions = [given.wanted[i].label if len(rows) == 1 else "" for i in range(count)]
        rows.append([SheetCell(to_image(images[i]), captions[i]) for i in range(count)])
        at = f", {strength:g}" if method["name"] in run.result["swept"] else ""
        labels.append(f"{method['model']}: {title(method)}{at}")
    return contact_sheet(rows, labels, title="Orange: the references", cell=72)


def write_table(result: Mapping[str, Any], path: str | Path) -> Path:
    """The table between the lines `<!-- bench-style -->` and `<!-- /bench-style -->` of a page, or as a new file."""
    return write_between(path, markdown(result), "bench-style")
