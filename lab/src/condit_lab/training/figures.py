"""Figures of the documentation from the cards of the shipped models: `python -m condit_lab.training.figures FILES`.

A page has places `<!-- figures:NAME -->` ... `<!-- /figures -->`, which are filled anew. NAME is a part or an adapter
of `assets/tiny/cards.json` (its last validation), or `tiny-unet/` and one of `assets/tiny-unet/cards.json`, and so of
`tiny-pixart/` and `small-classes/`; `curve:NAME` its losses, `cards` what every part has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from condit.data.files import atomic_write
from condit.weights.catalog import CLASSES, PIXART, TINY, UNET
from condit_lab.suites import pages

Cards = Mapping[str, Mapping]
CURVE_ROWS = 10
FOLDERS = {"": TINY, "tiny-unet/": UNET, "tiny-pixart/": PIXART, "small-classes/": CLASSES}


def shipped_cards() -> dict[str, Mapping]:
    """What the cards of all embedded models say, by part."""
    shipped: dict[str, Mapping] = {}
    for prefix, folder in FOLDERS.items():
        if (file := folder / "cards.json").is_file():
            cards = json.loads(file.read_text(encoding="utf-8"))
            shipped |= {f"{prefix}{name}": card for name, card in cards.items()}
    return shipped


def block(name: str, cards: Cards) -> str:
    """The text of one place; a part that is not shipped says so."""
    if name == "cards":
        return overview(cards)
    part = name.removeprefix("curve:")
    if part not in cards:
        called = part if part.startswith(tuple(filter(None, FOLDERS))) else f"tiny/{part}"
        return f"No weights of `{called}` are shipped (see Limits).\n"
    if name.startswith("curve:"):
        return curve(cards[part])
    card = cards[name]
    rows = [f"| {figure} | {value} |" for figure, value in card["figures"].items()]
    return "\n".join([f"After {card['images_seen']:,} images:", "", "| figure | value |", "|---|---|", *rows, ""])


def curve(card: Mapping) -> str:
    every = max(1, len(card["curve"]) // CURVE_ROWS)
    rows = [f"| {r['step']} | {r['loss']:.3f} | {r['images_per_s']} |" for r in card["curve"][::every]]
    return "\n".join(["| step | loss | images/s |", "|---|---|---|", *rows, ""])


def overview(cards: Cards) -> str:
    rows = [f"| {n} | {c['steps']} | {c['images_seen']:,} | {c['seconds'] / 60:.0f} |" for n, c in cards.items()]
    return "\n".join(["| part | steps | images seen | minutes |", "|---|---|---|---|", *rows, ""])


def fill(page: str, cards: Cards) -> str:
    """The page with every place filled."""
    return pages.fill(page, "figures", lambda name: block(name, cards))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m condit_lab.training.figures", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="pages with places, such as docs/tiny.md")
    given = parser.parse_args(arguments)
    cards = shipped_cards()
    for file in given.files:
        text = fill(file.read_text(encoding="utf-8"), cards)
        atomic_write(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
