"""Batches from the icon world: pictures by style and concept, references of other concepts, procedural styles."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from condit_lab.icons.procedural import Procedural
from condit_lab.icons.world import Icon, IconWorld, caption


@dataclass
class IconSet:
    """Icons in memory: rgba (N, 128, 128, 4) uint8, with look-ups by style and by (style, concept)."""

    icons: list[Icon]
    concepts: dict
    rgba: np.ndarray

    def __post_init__(self):
        self.by_style: dict[str, list[int]] = defaultdict(list)
        self.by_base: dict[str, list[int]] = defaultdict(list)
        for i, icon in enumerate(self.icons):
            self.by_style[icon.style].append(i)
            self.by_base[icon.base].append(i)

    def __len__(self) -> int:
        return len(self.icons)

    @classmethod
    def open(cls, path, **selection) -> IconSet:
        """An `IconWorld` selection (styles, groups, splits, licences) read into memory."""
        world = IconWorld.open(path, **selection)
        if not world.icons:
            raise ValueError(f"{path} holds no icon of the selection {selection}.")
        return cls(world.icons, world.concepts, world.rgba_all())

    def images(self, indices: list[int]) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1], on white."""
        return on_white(torch.from_numpy(self.rgba[indices]))

    def other_in_style(self, rng: random.Random, i: int) -> int:
        """Another concept of the same style."""
        choices = self.by_style[self.icons[i].style]
        return other(rng, choices, lambda j: self.icons[j].base != self.icons[i].base, i)

    def other_drawing(self, rng: random.Random, i: int) -> int:
        """The same concept in another style; the icon itself where there is none."""
        choices = self.by_base[self.icons[i].base]
        return other(rng, choices, lambda j: self.icons[j].style != self.icons[i].style, i)

    def caption(self, rng: random.Random, i: int, **odds) -> str:
        return caption(self.icons[i], self.concepts, rng, **odds)


def other(rng: random.Random, choices: list[int], good, fallback: int) -> int:
    """A random choice for which `good` holds; `fallback` after 20 misses."""
    for _ in range(20):
        j = rng.choice(choices)
        if good(j):
            return j
    return fallback


def on_white(rgba: Tensor) -> Tensor:
    """uint8 (B, H, W, 4) -> (B, 3, H, W) in [-1, 1]."""
    x = rgba.movedim(-1, 1).float() / 255
    return 2 * (x[:, :3] * x[:, 3:] + 1 - x[:, 3:]) - 1


def to_image(rgb: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(rgb).movedim(-1, 1).float() / 127.5 - 1


def procedural(style: Procedural, rgba: np.ndarray) -> Tensor:
    """One procedural style applied to icons (B, H, W, 4) -> (B, 3, H, W) in [-1, 1]."""
    return to_image(np.stack([style.apply(x) for x in rgba]))
