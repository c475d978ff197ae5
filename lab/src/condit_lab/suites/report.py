"""The page of an evaluation: tables, bar plots and sheets in one HTML file, the sheets as PNG beside it."""

from __future__ import annotations

import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from condit.data.files import atomic_write
from condit.data.images import save_image
from condit.data.sheets import SheetCell as Picture
from condit.data.sheets import contact_sheet
from condit.rulers.page import STYLE_SHEET, inline, slug
from condit.rulers.plot import FAINT, INK
from condit_lab.icons.world import IconWorld
from condit_lab.suites import measures
from condit_lab.suites.rows import COLOUR, LATENT, PSNR, REAL, SPLITS, SUBJECT_COLOUR, Scene, by_table, edge_scores
from condit_lab.suites.sets import Cell, Spec, prompt_of, shown

EXTREME, RANDOM, ACROSS, SIDE = 12, 24, 4, 96
BAR, REFERENCE_BAR, WHISKER = (66, 118, 178), (170, 170, 170), (20, 20, 20)
_LINE, _LABEL, _WIDTH, _VALUE = 24, 330, 460, 60


def write_page(folder: Path, result: Mapping[str, Any], scenes: Sequence[Scene], world: IconWorld) -> Path:
    """`index.html` with everything inside it, and its sheets and plots as `sheets/*.png`, `plots/*.png`."""
    parts = [
        f"<h1>condit: evaluation of {html.escape(result['model'])}</h1>",
        f"<p><code>{html.escape(result['command'])}</code>, {result['seconds']['all']:.0f} s. Model {result['hash']}. "
        "Intervals: 95 %, bootstrap over concepts. Blue bars show the model, gray bars the comparisons.</p>",
        _criteria_table(result["criteria"]),
    ]
    for number, (measure, split, rows) in enumerate(by_table(result["rows"])):
        picture = plot(rows)
        save_image(picture, folder / "plots" / f"{number:02d}-{split}-{slug(measure)}.png")
        parts += [f"<h2>{html.escape(measure)}, {SPLITS[split]}</h2>", inline(picture), _rows_table(rows)]
    for scene in scenes:
        for name, spec in scene.specs.items():
            picture = sheet(scene, name, spec, world, result["seed"])
            save_image(picture, folder / "sheets" / f"{name}.png")
            title = f"{name}: {spec.what}, {SPLITS[scene.split]}"
            parts += [f"<h2>{html.escape(title)}</h2>", f"<p>{_SCORES.get(name, _SCORE)}</p>", inline(picture)]
    parts += [f"<p>Left out: {html.escape(x['set'])} ({html.escape(x['why'])}).</p>" for x in result["skipped"]]
    parts.append(_confusion_table(result["judge"]["card"]))
    seconds = "; ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    parts.append(f"<p>Time: {html.escape(seconds)}.</p>")
    body = "\n".join(parts)
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><title>condit evaluation</title>'
    page += f"<style>{STYLE_SHEET}</style><body>\n{body}\n</body></html>\n"
    return atomic_write(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8"))


_SCORE = "Best and worst by the judge's probability of the style over the rank of the concept (1 = first)."
_SCORES = {
    "edges": "Best and worst by the F1 of the edges.",
    "gray": "Best and worst by the PSNR of the luma to the gray picture.",
}


def _confusion_table(card: Mapping[str, Any]) -> str:
    """How the judge takes real icons that it has not seen: rows are the true styles, figures in percent."""
    names, held_out = card["styles"], card["held_out"]
    lines = [
        f"<h2>The judge on {held_out['icons']} real icons that it has not seen: {held_out['accuracy']:.3f}</h2>",
        "<p>Row: the true style; column: what the judge says, in percent.</p><table><tr><th></th>",
        *(f'<th title="{html.escape(name)}">{number + 1}</th>' for number, name in enumerate(names)),
        "</tr>",
    ]
    for number, (name, shares) in enumerate(zip(names, held_out["confusion"], strict=True)):
        cells = "".join(f"<td class=number>{share * 100:.0f}</td>" if share else "<td></td>" for share in shares)
        lines.append(f"<tr><th>{number + 1} {html.escape(name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _criteria_table(criteria: Sequence[Mapping[str, Any]]) -> str:
    if not criteria:
        return ""
    lines = ["<table><tr><th>criterion</th><th>required</th><th>measured</th><th></th></tr>"]
    for entry in criteria:
        state = "holds" if entry["holds"] else '<span class="missed">missed</span>'
        lines.append(
            f"<tr><td>{html.escape(entry['text'])}</td><td class=number>{entry['wanted']:.3f}</td>"
            f"<td class=number>{entry['value']:.3f}</td><td>{state}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["<table><tr><th></th><th>value</th><th>95 %</th><th>of real icons</th><th>n</th></tr>"]
    for row in rows:
        part = row["of_ceiling"]
        share = f"{part[0]:.2f} ({part[1]:.2f} to {part[2]:.2f})" if part else ""
        lines.append(
            f"<tr><td>{html.escape(row['case'])}</td><td class=number>{row['value']:.3f}</td>"
            f"<td class=number>{row['low']:.3f} to {row['high']:.3f}</td><td class=number>{share}</td>"
            f"<td class=number>{row['n']}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def plot(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Horizontal bars from 0 with 95 % whiskers; shares on an axis to 1."""
    top = max(row["high"] for row in rows)
    if rows[0]["measure"] not in (PSNR, COLOUR, SUBJECT_COLOUR):
        top = max(top, 1.0) if top > 0.3 else top * 1.2
    top = top or 1.0
    font = ImageFont.load_default(13)
    image = Image.new("RGB", (_LABEL + _WIDTH + _VALUE, _LINE * len(rows) + 12), "white")
    draw = ImageDraw.Draw(image)

    def x(value: float) -> float:
        return _LABEL + max(value, 0.0) / top * _WIDTH

    for quarter in range(5):
        draw.line((x(top * quarter / 4), 0, x(top * quarter / 4), image.height), FAINT)
    for number, row in enumerate(rows):
        y = 6 + number * _LINE
        is_baseline = row["case"].startswith((REAL, LATENT, "copying", "no control", "the gray"))
        draw.text((_LABEL - 8, y + _LINE / 2), row["case"], INK, font=font, anchor="rm")
        draw.rectangle((_LABEL, y + 4, x(row["value"]), y + _LINE - 4), REFERENCE_BAR if is_baseline else BAR)
        draw.line((x(row["low"]), y + _LINE / 2, x(row["high"]), y + _LINE / 2), WHISKER, width=2)
        draw.text((x(row["high"]) + 6, y + _LINE / 2), f"{row['value']:.3g}", INK, font=font, anchor="lm")
    return image


def score(scene: Scene, name: str, world: IconWorld) -> Tensor:
    """What sorts a sheet, (N,): as `_SCORE` and `_SCORES` say."""
    if name == "edges":
        return edge_scores(scene, world)[name]
    if name == "gray":  # the true icon's luma is the given picture
        return measures.luma_psnr(scene.images[name], scene.images["real"])
    return scene.scores[name]


def sheet(scene: Scene, name: str, spec: Spec, world: IconWorld, seed: int) -> Image.Image:
    """12 best, 12 worst and 24 random cells: what was shown (orange), what was drawn, the true icon."""
    order = torch.argsort(score(scene, name, world), descending=True).tolist()
    drawn = random.Random(seed).sample(order, min(RANDOM, len(order)))
    rows: list[list[Picture | Image.Image | None]] = []
    labels: list[str] = []
    for title, chosen in (("best", order[:EXTREME]), ("worst", order[::-1][:EXTREME]), ("random", drawn)):
        for start in range(0, len(chosen), ACROSS):
            group = chosen[start : start + ACROSS]
            rows.append([picture for i in group for picture in _trio(scene, name, spec, world, i)])
            labels.append(title if start == 0 else "")
    title = f"{name}: {spec.what}. Orange: shown to the model; then the drawing; then the true icon, never seen"
    return contact_sheet(rows, labels, title=title, cell=SIDE, label_width=70)


def _trio(scene: Scene, name: str, spec: Spec, world: IconWorld, i: int) -> list[Picture]:
    cell: Cell = scene.cells[i]
    result = Picture(_image(scene.images[name][i]), prompt_of(scene.icons[i], spec))
    real = Picture(_image(scene.images["real"][i]), "true")
    if spec.reference is None:
        return [result, real]
    given = [Picture(picture, "shown", is_input=True) for picture in shown(world, cell, spec.reference)[:1]]
    return [*given, result, real]


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
