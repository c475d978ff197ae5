"""Rows of training batches whose targets have references: in the target's style, by vendor or by a procedural style."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from condit.encoders.image import TinyImage
from condit_lab.icons.procedural import Procedural
from condit_lab.training.icon_batches import IconSet, procedural

# Words that name no concept: the reference has to say what is drawn.
NAMELESS_SHARE = 0.7
NAMELESS = ("this", "this item", "the same thing", "这个", "同一个东西")


@dataclass
class Referenced:
    """Targets (B, 3, H, W), captions, references (B, R, 3, H, W), how many of the R count for each row (B,).

    `known` (K, R) numbers the references of the last K rows in a table of features made once; they have no pictures, so
    that `references` then has B - K rows. `lots` (B,) in [0, 1) decide which rows see their own target (`learn`).
    """

    images: Tensor
    captions: list[str]
    references: Tensor
    counts: Tensor
    known: Tensor | None = None
    lots: Tensor | None = None


class StyleIcons(Protocol):
    """What the style rows of a task are drawn from."""

    icons: IconSet
    unseen: IconSet
    ui: IconSet | None


class StyleSource(StyleIcons, Protocol):
    """What their references' features need besides."""

    image: TinyImage
    table: Tensor


def style_table(task: StyleSource) -> Tensor:
    """Features (N, E) of every icon, then of every UI icon. The encoder is frozen and icons as drawn never change, so
    they are made once."""
    sources = [task.icons, *([task.ui] if task.ui else [])]
    parts = [(source, range(i, min(i + 128, len(source)))) for source in sources for i in range(0, len(source), 128)]
    return torch.cat([task.image(source.images(list(rows))) for source, rows in parts])


def reference_features(task: StyleSource, batch: Referenced) -> Tensor:
    """The mean feature (B, E) of each row's references."""
    b, r = batch.references.shape[:2]
    parts = [task.image(batch.references.flatten(0, 1)).unflatten(0, (b, r))] if b else []
    if batch.known is not None:
        parts.append(task.table.to(batch.references.device)[batch.known])
    features = torch.cat(parts)
    counts = (torch.arange(r, device=features.device)[None] < batch.counts[:, None]).float()
    return (features * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)


def referenced(images: Tensor, captions: list[str], references: Tensor) -> Referenced:
    return Referenced(images, captions, references[:, None], torch.ones(len(images), dtype=torch.long))


def spread(icons: IconSet, count: int) -> list[int]:
    """Rows spread evenly over a set."""
    return random.Random(3).sample(range(len(icons)), min(count, len(icons)))


def style_caption(icons: IconSet, rng: random.Random, i: int) -> str:
    """The concept in words; the style mostly left to the reference."""
    return icons.caption(rng, i, p_no_style=0.95, p_tags=0.15)


def style_batch(
    task: StyleIcons, rng: random.Random, size: int, share: float, *, most: int, pictures: bool = True
) -> Referenced:
    """Targets with `most` references in the same style: procedural styles first, then vendors and UI families.

    `pictures=False` gives the references of the latter as numbers into a table over icons, then UI icons.
    """
    images, captions, references, known = [], [], [], []
    for _ in range(int(size * share)):
        style = Procedural.sample(rng)
        chosen = [rng.randrange(len(task.icons)) for _ in range(1 + most)]
        drawn = procedural(style, task.icons.rgba[chosen])
        images.append(drawn[:1])
        references.append(drawn[1:])
        captions.append(style_caption(task.icons, rng, chosen[0]))
    for n in range(size - len(images)):
        source = task.ui if task.ui is not None and n % 6 == 0 else task.icons
        i = rng.randrange(len(source))
        others = [source.other_in_style(rng, i) for _ in range(most)]
        images.append(source.images([i]))
        captions.append(style_caption(source, rng, i))
        if pictures:
            references.append(source.images(others))
        else:
            known.append([j + (len(task.icons) if source is task.ui else 0) for j in others])
    counts = torch.tensor([rng.choice((1, most)) for _ in images])
    table = torch.tensor(known) if known else None
    pixels = torch.cat(images)
    shown = torch.stack(references) if references else pixels.new_empty(0, most, *pixels.shape[1:])
    return Referenced(pixels, captions, shown, counts, table)


def style_examples(task: StyleIcons, icons: IconSet, count: int) -> Referenced:
    """Held-out targets; references are training icons of the style (of the set itself for a never-trained style)."""
    chosen, rng = spread(icons, count), random.Random(0)
    drawn = []
    for i in chosen:
        source = icons if icons is task.unseen else task.icons
        choices = source.by_style[icons.icons[i].style]
        j = next(j for j in (rng.choice(choices) for _ in range(99)) if source.icons[j].base != icons.icons[i].base)
        drawn.append(source.images([j])[0])
    return referenced(icons.images(chosen), [icons.icons[i].label for i in chosen], torch.stack(drawn))
