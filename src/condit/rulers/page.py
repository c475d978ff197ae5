"""Pieces of an HTML report: one file that holds its pictures."""

from __future__ import annotations

import base64
import io

from PIL import Image

STYLE_SHEET = """body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}.missed{color:#b02020;font-weight:600}
code{background:#f3f3f3;padding:.1em .3em}"""


def inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)  # a page of PNG sheets is too big to mail; those lie beside it
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
