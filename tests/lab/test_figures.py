"""lab/src/condit_lab/training/figures.py: the places of the pages are filled from the cards."""

import re
from pathlib import Path

import pytest

from condit_lab.training import figures

CARDS = {
    "model/x": {
        "steps": 20,
        "images_seen": 1280,
        "seconds": 90,
        "figures": {"error": 0.5},
        "curve": [{"step": n, "loss": 1 / n, "images_per_s": 7} for n in range(1, 31)],
    }
}


def test_places_are_filled_and_the_rest_stays():
    page = (
        "before\n<!-- figures:model/x -->\nold\n<!-- /figures -->\nbetween\n<!-- figures:cards -->\n<!-- /figures -->\n"
    )
    filled = figures.fill(page, CARDS)
    assert "After 1,280 images" in filled and "| error | 0.5 |" in filled and "old" not in filled
    assert "| model/x | 20 | 1,280 | 2 |" in filled
    assert filled.startswith("before\n") and "\nbetween\n" in filled
    assert figures.fill(filled, CARDS) == filled


def test_a_curve_is_thinned_and_a_missing_part_raises():
    assert figures.block("curve:model/x", CARDS).count("\n| ") == 10
    assert "No weights of `tiny/edges`" in figures.block("edges", CARDS)
    assert "No weights of `tiny-unet/style`" in figures.block("tiny-unet/style", CARDS)


PAGES = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_say_what_the_cards_of_the_shipped_models_say(page):
    text = page.read_text(encoding="utf-8")
    cards = figures.shipped_cards()
    assert figures.fill(text, cards) == text
    assert len(re.findall("<!-- figures:", text)) == text.count("<!-- /figures -->")
