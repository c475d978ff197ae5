"""The page of the style evaluation: curves, tables and sheets in one HTML file, the pictures as PNG beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condit.data.files import atomic_write
from condit.data.images import save_image
from condit.data.sheets import SheetCell as Picture
from condit.data.sheets import contact_sheet
from condit.rulers.page import STYLE_SHEET, inline, slug
from condit_lab.suites import style_rows as tables
from condit_lab.suites import style_rulers as rulers
from condit_lab.suites.style_methods import to_image
from condit_lab.suites.style_plot import curves

EXTREME, ACROSS, OVERVIEW = 6, 2, 8


def write_page(
    folder: Path,
    result: Mapping[str, Any],
    images: Mapping[tuple[str, float], Tensor],
    values: tables.Table,
    given: Mapping[str, rulers.Given],
) -> Path:
    """`index.html`, with its curves and sheets as `plots/*.png` and `sheets/*.png`."""
    parts = [
        "<h1>condit: evaluation of style transfer</h1>",
        f"<p><code>{html.escape(result['command'])}</code>, {result['seconds']['drawing']:.0f} s of drawing. "
        f"n = {result['n']} pictures of {result['concepts']} concepts in {result['styles']} styles; model "
        f"{result['hash']}. Intervals: 95 %, bootstrap over concepts. "
        "A method wins where it lies above the baseline's curve (black) at "
        "the same style score, not where it has more of one measure.</p>",
    ]
    measured = {row["measure"] for row in result["rows"]}
    for name in (m.name for m in rulers.MEASURES if m.compared and m.name in measured):
        picture = curves(result, name)
        save_image(picture, folder / "plots" / f"{slug(name)}.png")
        parts += [f"<h2>{html.escape(name)} against style</h2>", inline(picture)]
    parts += ["<h2>Figures</h2>", _to_html(tables.markdown(result)), "<h2>Measures</h2>", _measure_list()]
    picture = overview(result, images, values, given["style"])
    save_image(picture, folder / "sheets" / "overview.png")
    parts += ["<h2>The same pairs under every method</h2>", inline(picture)]
    for entry in result["methods"]:
        strength, shows = best_strength(values, entry["name"]), result["shows"][entry["name"]]
        if entry["name"] in ("real", "copy"):
            continue
        against = given[shows]
        blank = images[entry["blank"], tables.BLANK_STRENGTH]
        picture = cases(entry, strength, images[entry["name"], strength], blank, values, against)
        save_image(picture, folder / "sheets" / f"{entry['name']}.png")
        parts += [f"<h2>{html.escape(entry['what'])}: best and worst</h2>", f"<p>{_ORDER}</p>", inline(picture)]
    body = "\n".join(parts)
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><title>condit style evaluation</title>'
    page += f"<style>{STYLE_SHEET}</style><body>\n{body}\n</body></html>\n"
    return atomic_write(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8"))


_ORDER = "In the order of style score + text alignment - leakage. Orange: shown to the model."


def _measure_list() -> str:
    items = [f"<li><b>{html.escape(m.name)}</b>: {html.escape(m.what)}</li>" for m in rulers.MEASURES]
    return f"<ul>{''.join(items)}</ul>"


def _to_html(markdown: str) -> str:
    """Our own tables and lines; no more of Markdown than they use."""
    lines: list[str] = []
    inside = False
    for line in markdown.splitlines():
        row = line.startswith("|")
        if row != inside:
            lines.append("<table>" if row else "</table>")
            inside = row
        if row and set(line) <= set("|-"):
            continue
        text = html.escape(line)
        lines.append(
            "<tr>" + "".join(f"<td>{cell.strip()}</td>" for cell in text.strip("|").split("|")) + "</tr>"
            if row
            else f"<p>{text}</p>"
        )
    return "\n".join([*lines, "</table>" if inside else ""])


def best_strength(values: tables.Table, method: str) -> float:
    """The strength with the most style."""
    return max((s for m, s in values if m == method), key=lambda s: float(values[method, s][rulers.SCORE].mean()))


def overview(
    result: Mapping[str, Any],
    images: Mapping[tuple[str, float], Tensor],
    values: tables.Table,
    given: rulers.Given,
) -> Image.Image:
    """The first cells, a method a row at its strength with the most style."""
    count = min(OVERVIEW, len(given.wanted))
    rows = [[Picture(to_image(given.references[i]), given.icons[i].label, is_input=True) for i in range(count)]]
    labels = ["shown"]
    for entry in result["methods"]:
        if result["shows"][entry["name"]] != "style" or entry["name"] == "copy":
            continue
        strength = best_strength(values, entry["name"])
        drawn = images[entry["name"], strength]
        rows.append([Picture(to_image(drawn[i]), given.wanted[i].label) for i in range(count)])
        labels.append(entry["what"] + (f" at {strength:g}" if entry["name"] in result["swept"] else ""))
    return contact_sheet(rows, labels, title="Orange: shown to the model. Below: drawn for the words", cell=96)


def cases(
    entry: Mapping[str, Any],
    strength: float,
    drawn: Tensor,
    blank: Tensor,
    values: tables.Table,
    given: rulers.Given,
) -> Image.Image:
    """The best and the worst pairs: what was shown, without a control, the result, the true icon."""
    measured = values[entry["name"], strength]
    score = measured[rulers.SCORE] + measured[rulers.ALIGNMENT] - measured[rulers.LEAKAGE]
    order = torch.argsort(score, descending=True).tolist()
    rows: list[list[Picture | Image.Image | None]] = []
    labels: list[str] = []
    count = min(EXTREME, max(1, len(order) // 2))
    for title, chosen in (("best", order[:count]), ("worst", order[::-1][:count])):
        for start in range(0, len(chosen), ACROSS):
            row: list[Picture | Image.Image | None] = []
            for i in chosen[start : start + ACROSS]:
                row += [
                    Picture(to_image(given.references[i]), given.icons[i].label, is_input=True),
                    Picture(to_image(blank[i]), "no control"),
                    Picture(to_image(drawn[i]), given.wanted[i].label),
                    Picture(to_image(given.true[i]), "true"),
                ]
            rows.append(row)
            labels.append(title if start == 0 else "")
    title = f"{entry['what']}, strength {strength:g}"
    return contact_sheet(rows, labels, title=title, cell=96, label_width=70)
