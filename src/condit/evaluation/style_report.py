"""The page of the style evaluation: curves, tables and sheets in one HTML file, the pictures as PNG beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from condit.data.files import atomic_write
from condit.data.images import save_image
from condit.data.sheets import Cell as Picture
from condit.data.sheets import contact_sheet
from condit.evaluation import style_rows as tables
from condit.evaluation import style_rulers as rulers
from condit.evaluation.report import FAINT, INK, STYLE_SHEET, inline, slug

EXTREME, ACROSS, OVERVIEW = 6, 2, 8
_SCALE, _WIDTH, _HEIGHT, _LEFT, _BOTTOM, _LEGEND = 2, 620, 430, 62, 46, 300
_COLOURS = (
    (20, 20, 20),
    (31, 119, 180),
    (214, 90, 20),
    (44, 140, 60),
    (190, 40, 60),
    (120, 80, 170),
    (120, 90, 70),
    (0, 150, 160),
    (200, 80, 160),
    (140, 140, 20),
)


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
        f"<p><code>{html.escape(result['command'])}</code>, {result['seconds']['all']:.0f} s. n = {result['n']} "
        f"pictures of {result['concepts']} concepts in {result['styles']} styles; model {result['hash']}. "
        "Intervals: 95 %, bootstrap over concepts. A method wins where it lies above the baseline's curve (black) at "
        "the same style score, not where it has more of one measure.</p>",
    ]
    for name in (m.name for m in rulers.MEASURES if m.compared):
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
    found: list[str] = []
    inside = False
    for line in markdown.splitlines():
        row = line.startswith("|")
        if row != inside:
            found.append("<table>" if row else "</table>")
            inside = row
        if row and set(line) <= set("|-"):
            continue
        text = html.escape(line)
        found.append(
            "<tr>" + "".join(f"<td>{cell.strip()}</td>" for cell in text.strip("|").split("|")) + "</tr>"
            if row
            else f"<p>{text}</p>"
        )
    return "\n".join([*found, "</table>" if inside else ""])


def best_strength(values: tables.Table, method: str) -> float:
    """The strength with the most style."""
    return max((s for m, s in values if m == method), key=lambda s: float(values[method, s][rulers.SCORE].mean()))


def curves(result: Mapping[str, Any], measure: str) -> Image.Image:
    """Every method over its strengths: style score across, the measure up, 95 % whiskers on both. Methods with one
    strength are points; the baselines are thick and start at no control."""
    found = {(r["method"], r["strength"], r["measure"]): r for r in result["rows"]}
    methods = [
        m for m in result["methods"] if any((m["name"], s, measure) in found for s in _strengths(found, m["name"]))
    ]
    methods = [m for m in methods if any(k[0] == m["name"] and k[2] == rulers.SCORE for k in found)]
    methods = [m for m in methods if result["shows"][m["name"]] == "style"]
    points = {
        m["name"]: [
            (found[m["name"], s, rulers.SCORE], found[m["name"], s, measure]) for s in _strengths(found, m["name"])
        ]
        for m in methods
    }
    every = [point for group in points.values() for point in group]
    frame = _Frame.of([x for x, _ in every], [y for _, y in every])
    image = Image.new("RGB", ((_LEFT + _WIDTH + _LEGEND) * _SCALE, (_HEIGHT + _BOTTOM + 12) * _SCALE), "white")
    pen = ImageDraw.Draw(image)
    frame.draw(pen, rulers.SCORE, measure)
    baselines = {m["baseline"]: m["blank"] for m in methods if m["baseline"]}
    for number, method in enumerate(methods):
        name, colour = method["name"], _COLOURS[number % len(_COLOURS)]
        line = points[name]
        if name in baselines and baselines[name] in points:
            colour, line = _COLOURS[0], [*points[baselines[name]], *line]
        _draw_curve(pen, frame, line, colour, 3 if name in baselines else 1)
        if len(points[name]) > 1:
            for x, y in points[name]:
                at = frame.at(x["value"], y["value"])
                pen.text(
                    (at[0] + 7 * _SCALE, at[1] - 7 * _SCALE), f"{x['strength']:g}", colour, font=_font(10), anchor="ls"
                )
        top = (14 + 20 * number) * _SCALE
        left = (_LEFT + _WIDTH + 14) * _SCALE
        pen.rectangle((left, top - 5 * _SCALE, left + 10 * _SCALE, top + 5 * _SCALE), colour)
        pen.text((left + 16 * _SCALE, top), method["what"], INK, font=_font(12), anchor="lm")
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


def _strengths(found: Mapping[tuple[str, float, str], Any], method: str) -> list[float]:
    return sorted({s for m, s, _ in found if m == method})


def _font(size: int):
    return ImageFont.load_default(size * _SCALE)


class _Frame:
    """Axes: what is where."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self.x, self.y = x, y

    @classmethod
    def of(cls, xs: Sequence[Mapping[str, Any]], ys: Sequence[Mapping[str, Any]]) -> _Frame:
        def span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
            low, high = min(r["low"] for r in rows), max(r["high"] for r in rows)
            margin = 0.05 * (high - low or 1.0)
            return low - margin, high + margin

        return cls(span(xs), span(ys))

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (_LEFT + across * _WIDTH) * _SCALE, (8 + (1 - up) * _HEIGHT) * _SCALE

    def draw(self, pen: ImageDraw.ImageDraw, across: str, up: str) -> None:
        for part in range(6):
            x = self.x[0] + part / 5 * (self.x[1] - self.x[0])
            y = self.y[0] + part / 5 * (self.y[1] - self.y[0])
            pen.line((*self.at(x, self.y[0]), *self.at(x, self.y[1])), FAINT)
            pen.line((*self.at(self.x[0], y), *self.at(self.x[1], y)), FAINT)
            left, bottom = self.at(x, self.y[0])
            pen.text((left, bottom + 4 * _SCALE), f"{x:.2f}", INK, font=_font(10), anchor="ma")
            left, bottom = self.at(self.x[0], y)
            pen.text((left - 5 * _SCALE, bottom), f"{y:.2f}", INK, font=_font(10), anchor="rm")
        left, bottom = self.at(sum(self.x) / 2, self.y[0])
        pen.text((left, bottom + 22 * _SCALE), across, INK, font=_font(12), anchor="ma")
        left, top = self.at(self.x[0], self.y[1])
        pen.text((left + 6 * _SCALE, top + 2 * _SCALE), f"up: {up}", INK, font=_font(12), anchor="la")


def _draw_curve(
    pen: ImageDraw.ImageDraw,
    frame: _Frame,
    line: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    colour: tuple[int, int, int],
    width: int,
) -> None:
    faint = tuple(round(c + (255 - c) * 0.6) for c in colour)
    for x, y in line:
        pen.line((*frame.at(x["low"], y["value"]), *frame.at(x["high"], y["value"])), faint, width=_SCALE)
        pen.line((*frame.at(x["value"], y["low"]), *frame.at(x["value"], y["high"])), faint, width=_SCALE)
    pen.line([frame.at(x["value"], y["value"]) for x, y in line], colour, width=width * _SCALE)
    for x, y in line:
        left, top = frame.at(x["value"], y["value"])
        pen.ellipse((left - 4 * _SCALE, top - 4 * _SCALE, left + 4 * _SCALE, top + 4 * _SCALE), colour)


def overview(
    result: Mapping[str, Any],
    images: Mapping[tuple[str, float], Tensor],
    values: tables.Table,
    given: rulers.Given,
) -> Image.Image:
    """The first cells, a method a row at its strength with the most style."""
    count = min(OVERVIEW, len(given.wanted))
    rows = [[Picture(_image(given.references[i]), given.icons[i].label, given=True) for i in range(count)]]
    labels = ["shown"]
    for entry in result["methods"]:
        if result["shows"][entry["name"]] != "style" or entry["name"] == "copy":
            continue
        strength = best_strength(values, entry["name"])
        drawn = images[entry["name"], strength]
        rows.append([Picture(_image(drawn[i]), given.wanted[i].label) for i in range(count)])
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
    found = values[entry["name"], strength]
    score = found[rulers.SCORE] + found[rulers.ALIGNMENT] - found[rulers.LEAKAGE]
    order = torch.argsort(score, descending=True).tolist()
    rows: list[list[Picture | Image.Image | None]] = []
    labels: list[str] = []
    for title, chosen in (("best", order[:EXTREME]), ("worst", order[::-1][:EXTREME])):
        for start in range(0, len(chosen), ACROSS):
            row: list[Picture | Image.Image | None] = []
            for i in chosen[start : start + ACROSS]:
                row += [
                    Picture(_image(given.references[i]), given.icons[i].label, given=True),
                    Picture(_image(blank[i]), "no control"),
                    Picture(_image(drawn[i]), given.wanted[i].label),
                    Picture(_image(given.true[i]), "true"),
                ]
            rows.append(row)
            labels.append(title if start == 0 else "")
    title = f"{entry['what']}, strength {strength:g}"
    return contact_sheet(rows, labels, title=title, cell=96, label_width=70)


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
