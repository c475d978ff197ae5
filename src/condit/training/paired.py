"""Batches of paired pictures for DEADiff (arXiv:2403.06951, section 3.3): from the icon world, or from a folder or tars
of style groups and content groups."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.data.grouped import KINDS, GroupedPairs, Kind
from condit.data.icon_captions import plain_caption
from condit.data.images import load_image, to_tensor
from condit.data.pairs import open_pairs
from condit.encoders.clip_patches import resize_antialiased
from condit.training.icon_batches import IconSet
from condit.training.referenced import NAMELESS
from condit.weights.latent_models import Frame


@dataclass
class Paired:
    """Targets (B, 3, H, W) and references (B, 3, S, S) in [-1, 1], the targets' captions, and what they share. frames:
    what the targets were cut from; None: they are whole."""

    kind: Kind
    images: Tensor
    references: Tensor
    captions: list[str]
    frames: list[Frame] | None = None


class PairSource(Protocol):
    """Where batches come from: a pure function of `rng`."""

    def batch(self, rng: random.Random, kind: Kind, size: int) -> Paired: ...


@dataclass(frozen=True)
class FolderSource:
    """Pictures of `GroupedPairs`: targets cropped to `size`, references resized as in the released training."""

    pairs: GroupedPairs
    size: tuple[int, int]
    reference_size: int

    @classmethod
    def open(cls, source: str | Path, size: tuple[int, int], reference_size: int) -> FolderSource:
        return cls(GroupedPairs(open_pairs(source)), size, reference_size)

    def batch(self, rng: random.Random, kind: Kind, size: int) -> Paired:
        drawn = [self.pairs.draw(rng, kind) for _ in range(size)]
        pictures = [load_image(target.image) for target, _ in drawn]
        images = torch.stack([to_tensor(picture, self.size, fit="crop") for picture in pictures])
        references = torch.cat([self.reference(source) for _, source in drawn])
        frames = [cropped((picture.height, picture.width), self.size) for picture in pictures]
        return Paired(kind, images, references, [target.text for target, _ in drawn], frames)

    def reference(self, source) -> Tensor:
        """(1, 3, S, S), from the whole picture."""
        picture = load_image(source)
        whole = to_tensor(picture, (picture.height, picture.width))[None]
        return resize_antialiased(whole, (self.reference_size, self.reference_size))


class IconSource:
    """Icons: a style pair is another concept of the same style, a content pair the same concept by another hand.

    The caption of a style pair mostly leaves the style to the reference; that of a content pair tells the style and, in
    the share `nameless` of them, leaves the concept to the reference.
    """

    def __init__(self, icons: IconSet, size: tuple[int, int], reference_size: int, *, nameless: float = 0.5):
        self.icons, self.size, self.reference_size, self.nameless = icons, size, reference_size, nameless
        by_style, by_base = defaultdict(set), defaultdict(set)
        for icon in icons.icons:
            by_style[icon.style].add(icon.base)
            by_base[icon.base].add(icon.style)
        rows = range(len(icons))
        self.rows: dict[Kind, list[int]] = {
            "style": [i for i in rows if len(by_style[icons.icons[i].style]) > 1],
            "content": [i for i in rows if len(by_base[icons.icons[i].base]) > 1],
            "reconstruction": list(rows),
        }
        for kind in KINDS:
            if not self.rows[kind]:
                raise ValueError(f"These icons have no {kind} pair. Take more styles or concepts.")

    def batch(self, rng: random.Random, kind: Kind, size: int) -> Paired:
        chosen = [rng.choice(self.rows[kind]) for _ in range(size)]
        others = [self.partner(rng, kind, i) for i in chosen]
        captions = [self.caption(rng, kind, i) for i in chosen]
        images, references = (resized(self.icons.images(rows), side) for rows, side in self.sizes(chosen, others))
        return Paired(kind, images, references, captions)

    def sizes(self, chosen: list[int], others: list[int]):
        return (chosen, self.size), (others, (self.reference_size, self.reference_size))

    def partner(self, rng: random.Random, kind: Kind, i: int) -> int:
        """The reference of icon i; itself for reconstruction alone."""
        if kind == "reconstruction":
            return i
        one, icons = self.icons.icons[i], self.icons
        same = icons.by_style[one.style] if kind == "style" else icons.by_base[one.base]
        apart = "base" if kind == "style" else "style"
        return rng.choice([j for j in same if getattr(icons.icons[j], apart) != getattr(one, apart)])

    def caption(self, rng: random.Random, kind: Kind, i: int) -> str:
        if kind == "style":
            return self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.9, p_tags=0.1)
        if kind == "content" and rng.random() < self.nameless:
            icon = self.icons.icons[i]
            return plain_caption(icon).replace(icon.label, rng.choice(NAMELESS), 1)
        return self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.0, p_tags=0.1)


def cropped(original: tuple[int, int], size: tuple[int, int]) -> Frame:
    """What a network is told of a picture of (height, width) that was made as large as covers `size` and lost the rest
    on both sides: SDXL's original size, and the corner in the enlarged picture (arXiv:2307.01952, section 2.2)."""
    (height, width), (rows, columns) = original, size
    scale = max(rows / height, columns / width)
    top, left = (round((side * scale - cut) / 2) for side, cut in ((height, rows), (width, columns)))
    return Frame(size, original, (top, left), size)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) at another size, by area."""
    return images if tuple(images.shape[-2:]) == size else F.interpolate(images, size=size, mode="area")
