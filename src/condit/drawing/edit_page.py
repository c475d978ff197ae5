"""The result page of an edit: source, round trip, edit, and the attention of the image to the words."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from condit.controls.dit4edit import changed_words
from condit.data.sheets import SheetCell, contact_sheet
from condit.drawing.edit import EditResult
from condit.encoders.words import Words

MOST_WORDS = 6


def edit_page(result: EditResult, source: str, target: str, *, number: int = 0) -> Image.Image:
    """One sheet for image `number` of a result with PIL images."""
    sides = zip((source, target), edited_words(result, number), (result.sources, result.images), strict=True)
    trip = f"round trip {result.psnr[number]:.1f} dB" if result.psnr else ""
    first: list[SheetCell | None] = [
        SheetCell(result.sources[number], "source", is_input=True),
        *([] if result.round_trips is None else [SheetCell(result.round_trips[number], trip)]),
        SheetCell(result.images[number], "edit"),
    ]
    rows, labels = [first], [f"{source}\n-> {target}"]
    if result.maps is not None:
        for side, (prompt, words, pictures) in enumerate(sides):
            if words:
                maps = result.maps[number, side]
                cells = [SheetCell(shade(pictures[number], maps[:, list(t)].sum(-1), result.grid), w) for w, t in words]
                rows.append(list(cells))
                labels.append(f"attention in\n{prompt}")
    steps, solver = result.recipe["num_inference_steps"], result.recipe["solver"]
    return contact_sheet(rows, labels, title=f"{steps} steps, inversion {solver}")


def edited_words(result: EditResult, number: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The words that differ, of source and target, with their tokens; all words where none differ."""
    if result.words is None:
        return [[], []]
    sides = result.words.source[number], result.words.target[number]
    words_of_sides = []
    for words, numbers in zip(sides, changed_words(*sides), strict=True):
        words_of_sides.append(named(words, numbers or range(len(words.words))))
    return words_of_sides


def named(words: Words, numbers) -> list[tuple[str, tuple[int, ...]]]:
    return [(words.words[i], words.tokens[i]) for i in numbers if words.tokens[i]][:MOST_WORDS]


def shade(picture: Image.Image, weights: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The image, bright where it attends to a word, relative to its largest weight."""
    values = weights.float().cpu().unflatten(0, grid)
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    mask = Image.fromarray((40 + 215 * values).round().to(torch.uint8).numpy())
    mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, (20, 24, 60)), mask)
