"""Pieces of HTML reports, one file that holds its pictures, and the page of `condit evaluate folder`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from condit.data.files import atomic_write

STYLE_SHEET = """body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}.missed{color:#b02020;font-weight:600}
code{background:#f3f3f3;padding:.1em .3em}.blind,.blind td{color:#aaa}"""
NAMED = 20  # problems of a kind that the page names; report.json names all


def inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)  # a page of PNG sheets is too big to mail; those lie beside it
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def table(head: Sequence[str], rows: Sequence[Sequence[object]], blind: Sequence[bool] = ()) -> str:
    """HTML of a table; blind rows are gray."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for i, row in enumerate(rows):
        mark = ' class="blind"' if i < len(blind) and blind[i] else ""
        cells = "".join(f"<td>{html.escape('' if cell is None else str(cell))}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return "\n".join([*lines, "</table>"]) if rows else "<p>None.</p>"


def span(x: Mapping[str, Any] | None) -> str:
    """A value with its interval."""
    if x is None or x["value"] is None:
        return ""
    ends = "" if x["low"] is None else f" ({x['low']:.3f} to {x['high']:.3f})"
    return f"{x['value']:.4g}{ends}"


def write_page(folder: Path, result: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> Path:
    """index.html of a report (`report.evaluate_folder`)."""
    title = {row["name"]: row["title"] for row in result["rulers"]}
    blind = {row["name"]: row["passes"] is False for row in result["rulers"]}
    parts = [
        "<h1>Pictures of methods, measured</h1>",
        f"<p>{result['pictures']} pictures of {result['contents']} contents. Intervals: 95 %, bootstrap over contents: "
        "they speak for other contents, not for other styles. Gray: a ruler that cannot tell what it is for on these "
        "pictures. Axis of style: "
        f"{html.escape(title.get(result['axis'], 'none that tells'))}; baseline: {html.escape(result['baseline'])}; "
        f"leakage is counted from: {html.escape(result['blank'] or 'nothing (no method without a reference)')}.</p>",
        "<h2>Problems</h2>",
        _problems(result["problems"]),
        "<h2>Do the rulers tell?</h2><p>Area under the ROC on the given pictures; 0.5 = blind. A ruler of style should "
        "tell style and be blind to content.</p>",
        _ruler_table(result),
        "<h2>Figures</h2>",
        _figure_table(result, title, blind),
        *(
            f"<h2>{html.escape(name)}</h2>{inline(picture)}"
            for name, picture in pictures.items()
            if " against " in name
        ),
        "<h2>At equal style</h2>",
        _comparison_table(result, title),
        "<h2>Sets of pictures</h2>" + _set_table(result["sets"]) if result["sets"] else "",
        *(f"<h2>{html.escape(name)}</h2>{inline(p)}" for name, p in pictures.items() if " against " not in name),
        "<h2>Encoders</h2>",
        table(
            ["encoder", "hash", "pictures are", "note"],
            [[e["name"], e["hash"], e["size"], e["note"]] for e in result["encoders"]],
        ),
    ]
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><title>condit evaluate folder</title>'
    body = "\n".join(parts)
    page += f"<style>{STYLE_SHEET}</style><body>\n{body}\n</body></html>\n"
    return atomic_write(folder / "index.html", lambda path: path.write_text(page, encoding="utf-8"))


def _problems(problems: Mapping[str, Sequence[str]]) -> str:
    rows = [
        [kind, len(names), "; ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")]
        for kind, names in problems.items()
    ]
    return table(["what", "number", "which"], rows)


def _ruler_table(result: Mapping[str, Any]) -> str:
    rows = []
    for r in result["rulers"]:
        tests, people = r["tests"], result["people"].get(r["name"])
        own = next(iter(tests.values()), None)
        verdict = {True: "tells", False: "cannot tell", None: "not tested"}[r["passes"]]
        areas = [span(tests[t]["area"]) if t in tests else "" for t in ("style", "content", "text", "words")]
        levels = ["", "", ""] if own is None else [own["how"], f"{own['other']:.4g}", f"{own['same']:.4g}"]
        agreed = [span(people["share"]), span(people["correlation"])] if people else []
        rows.append(
            [r["title"], "more" if r["more"] else "less", verdict, *areas, *levels, r["paper"], r["equation"], *agreed]
        )
    head = [
        "ruler",
        "better",
        "verdict",
        "style",
        "content",
        "text",
        "words",
        "tested on",
        "level of others",
        "of same",
    ]
    people = ["agrees with people", "rank correlation"] if result["people"] else []
    return table([*head, "paper", "equation", *people], rows, [r["passes"] is False for r in result["rulers"]])


def _figure_table(result: Mapping[str, Any], title: Mapping[str, str], blind: Mapping[str, bool]) -> str:
    keys = list(dict.fromkeys((f["method"], f["strength"]) for f in result["figures"]))
    found = {(f["ruler"], f["method"], f["strength"]): f for f in result["figures"]}
    head = ["ruler", *(m if s is None else f"{m} {s:g}" for m, s in keys)]
    rows = [[title[name], *(span(found.get((name, *key))) for key in keys)] for name in title]
    chance = result["chance of style retrieval"]
    note = "" if chance is None else f"<p>Style retrieval finds {chance:.3f} by chance.</p>"
    return table(head, rows, [blind[name] for name in title]) + note


def _comparison_table(result: Mapping[str, Any], title: Mapping[str, str]) -> str:
    rows = []
    for c in result["comparisons"]:
        gap = c["gap"]
        difference = {"value": gap["difference"], "low": gap["low"], "high": gap["high"]}
        at = "" if c["strength"] is None else f"{c['strength']:g}"
        where = span(difference) or f"{gap['side']} the curve"
        p = "" if c["p"] is None else f"{c['p']:.3g}"
        rows.append(
            [c["method"], at, title[c["ruler"]], where, c["verdict"], p, f"{gap['outside']:.0%}", c["n"], c["needed"]]
        )
    note = (
        "<p>A method less the baseline at the same style (a point of its curve, linear between strengths). p is "
        "corrected for the number of comparisons (Holm). Beyond: share of resamples beyond the curve's ends. Last: "
        "the number of pictures that tells a difference of 0.05 in 80 % of studies.</p>"
    )
    head = ["method", "strength", "ruler", "difference", "verdict", "p", "beyond", "n", "to tell 0.05 you need n ="]
    empty = "<p>No curve to compare with: a baseline needs two strengths, or one and a method without a reference.</p>"
    return note + table(head, rows) if rows else empty


def _set_table(sets: Sequence[Mapping[str, Any]]) -> str:
    names = ("FID", "KID", "KID low", "KID high", "ArtFID")
    rows = [
        [
            s["method"],
            s["strength"],
            s["n"],
            s["references"],
            *(f"{s[n]:.4g}" if s.get(n) is not None else "" for n in names),
        ]
        for s in sets
    ]
    note = "<p>Against the style references, with the Inception of the encoders' table. FID falls with the number of "
    note += "pictures: compare only sets of equal size. Below 2,048 it is far from its limit; KID is unbiased.</p>"
    return note + table(["method", "strength", "pictures", "references", *names], rows)
