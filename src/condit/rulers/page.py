"""Pieces of HTML reports, one file that holds its pictures, and the page of `condit evaluate folder`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from condit.data.files import atomic_write
from condit.weights.files import Json

STYLE_SHEET = """body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td{vertical-align:top}td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}.missed{color:#b02020;font-weight:600}
code{background:#f3f3f3;padding:.1em .3em}.blind,.blind td{color:#aaa}"""
NAMED = 20  # problems of a kind that the page names; report.json names all


def inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)  # a page of PNG sheets is too big to mail; those lie beside it
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def table(head: str, rows: Sequence[Sequence[object]], blind: Sequence[bool] = ()) -> str:
    """HTML of a table, whose heads are separated by |; blind rows are gray."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head.split("|")) + "</tr>"]
    for i, row in enumerate(rows):
        texts = ("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        lines.append(f"<tr{' class=blind' if i < len(blind) and blind[i] else ''}>{cells}</tr>")
    return "\n".join([*lines, "</table>"]) if rows else "<p>None.</p>"


def span(x: Json | None) -> str:
    """A value with its interval."""
    if x is None or x["value"] is None:
        return ""
    ends = "" if x["low"] is None else f" ({x['low']:.3f} to {x['high']:.3f})"
    return f"{x['value']:.4g}{ends}"


def write_page(folder: Path, result: Json, pictures: Mapping[str, Image.Image]) -> Path:
    """index.html of a report (`report.evaluate_folder`), from page.html."""
    rulers = {row["name"]: {**row, "title": f"{row['title']} [{row['hash'][:8] or '-'}]"} for row in result["rulers"]}
    shown = {name: f"<h2>{html.escape(name)}</h2>{inline(picture)}\n" for name, picture in pictures.items()}
    of_style = rulers[result["axis"]]["title"] if result["axis"] else "none, since no ruler of style tells"
    texts = {"axis": of_style, "baseline": result["baseline"], "blank": result["blank"] or "nothing"}
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        {name: html.escape(text) for name, text in texts.items()},
        sheet=STYLE_SHEET,
        pictures=result["pictures"],
        contents=result["contents"],
        problems=table("what|number|which", [[kind, len(n), _few(n)] for kind, n in result["problems"].items()]),
        rulers=_ruler_table(result, rulers),
        figures=_figure_table(result, rulers),
        curves="".join(text for name, text in shown.items() if " against " in name),
        comparisons=_comparison_table(result, rulers),
        sets=_set_table(result["sets"]),
        sheets="".join(text for name, text in shown.items() if " against " not in name),
        equations=table("ruler|equation|paper", [[r["title"], r["equation"], r["paper"]] for r in rulers.values()]),
        encoders=table("encoder|hash|pictures are|note", [list(e.values()) for e in result["encoders"]]),
    )
    return atomic_write(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8"))


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")


def _ruler_table(result: Json, rulers: Json) -> str:
    rows = []
    for r in rulers.values():
        tests, people = r["tests"], result["people"].get(r["name"])
        own = next(iter(tests.values()), {"how": "", "other": "", "same": ""})
        verdict = {True: "tells", False: "cannot tell", None: "not tested"}[r["passes"]]
        areas = [span(tests[t]["area"]) if t in tests else "" for t in ("style", "content", "text", "words")]
        agreed = [span(people["share"]), span(people["correlation"])] if people else ["", ""]
        better = "more" if r["more"] else "less"
        rows.append([r["title"], better, verdict, *areas, own["how"], own["other"], own["same"], *agreed])
    head = "ruler|better|verdict|style|content|text|words|tested on|level of others|of same|as people|rank correlation"
    return table(head, rows, [r["passes"] is False for r in rulers.values()])


def _figure_table(result: Json, rulers: Json) -> str:
    keys = list(dict.fromkeys((f["method"], f["strength"]) for f in result["figures"]))
    found = {(f["ruler"], f["method"], f["strength"]): f for f in result["figures"]}
    head = "|".join(["ruler", *(m if s is None else f"{m} {s:g}" for m, s in keys)])
    rows = [[r["title"], *(span(found.get((name, *key))) for key in keys)] for name, r in rulers.items()]
    chance = result["chance of style retrieval"]
    note = "" if chance is None else f"<p>Style retrieval finds {chance:.3f} by chance.</p>"
    return table(head, rows, [r["passes"] is False for r in rulers.values()]) + note


def _comparison_table(result: Json, rulers: Json) -> str:
    rows = []
    for c in result["comparisons"]:
        gap = c["gap"]
        where = span({**gap, "value": gap["difference"]}) or f"{gap['side']} the curve"
        head = [c["method"], c["strength"], rulers[c["ruler"]]["title"], where, c["verdict"]]
        rows.append([*head, c["p"], f"{gap['outside']:.0%}", c["n"], c["needed"]])
    return table("method|strength|ruler|difference|verdict|p|beyond|n|to tell 0.05 you need n =", rows)


def _set_table(sets: Sequence[Json]) -> str:
    names = ("method", "strength", "n", "references", "FID", "KID", "KID low", "KID high", "ArtFID")
    return table("|".join(names), [[s.get(name) for name in names] for s in sets])
