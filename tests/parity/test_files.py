"""docs/files.md: every row of its tables is a check here, and the page holds the rows and nothing else.

python -m pytest tests/parity/test_files.py   # with CONDIT_WRITE_DOCS=1 it writes the tables
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from file_rows import Row, World, flux_rows, unet_rows
from model_rows import adapter_rows, file_rows, folder_rows

PAGE = Path(__file__).parents[2] / "docs" / "files.md"
TABLES: dict[str, list[Row]] = {
    "files": file_rows(),
    "folders": folder_rows(),
    "lora": [*unet_rows("sd15"), *unet_rows("sdxl"), *flux_rows()],
    "ip-adapter": adapter_rows(),
}
ROWS = [row for rows in TABLES.values() for row in rows]


@pytest.fixture(scope="module")
def made() -> dict:
    return {}


@pytest.fixture
def world(made, make_sd, tmp_path: Path) -> World:
    return World(make_sd, made, tmp_path)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
@torch.no_grad()
def test_row(row: Row, world: World):
    row.check(world)


def table(rows: Sequence[Row]) -> str:
    """Markdown: exact rows by layout with all their models, then refused ones."""
    lines = ["| layout | model | condit | checked against, or the error's words |", "|---|---|---|---|"]
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        seen.setdefault((row.layout, row.result, row.test), []).append(row.base)
    for (layout, result, test), bases in seen.items():
        lines.append(f"| {layout} | {', '.join(dict.fromkeys(bases))} | {result} | {test} |")
    return "\n".join(lines)


def test_the_page_holds_these_rows():
    text = PAGE.read_text(encoding="utf-8")
    written = text
    for name, rows in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, written, re.DOTALL), f"docs/files.md has no place for the table {name!r}"
        written = re.sub(pattern, lambda m, rows=rows: f"{m[1]}\n{table(rows)}\n\n{m[2]}", written, flags=re.DOTALL)
    if os.environ.get("CONDIT_WRITE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
    assert text == written or os.environ.get("CONDIT_WRITE_DOCS")


def test_no_row_stands_twice():
    assert len({row.id for row in ROWS}) == len(ROWS)
