"""Batches of paired pictures for DEADiff (arXiv:2403.06951, section 3.3): from the icon world, or from a folder or tars
of style groups and content groups."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.data.grouped import GroupedPairs, PairKind
from condit.data.images import load_image, to_tensor
from condit.data.pairs import open_pairs
from condit.encoders.clip_patches import resize_antialiased
from condit.training.plugins import icon_world
from condit.weights.latent_models import Frame


@dataclass
class Paired:
    """Targets (B, 3, H, W) and references (B, 3, S, S) in [-1, 1], the targets' captions, and what they share. frames:
    what the targets were cut from; None: they are whole."""

    kind: PairKind
    images: Tensor
    references: Tensor
    captions: list[str]
    frames: list[Frame] | None = None


class PairSource(Protocol):
    """Where batches come from: a pure function of `rng`."""

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired: ...


@dataclass(frozen=True)
class FolderSource:
    """Pictures of `GroupedPairs`: targets cropped to `size`, references resized as in the released training."""

    pairs: GroupedPairs
    size: tuple[int, int]
    reference_size: int

    @classmethod
    def open(cls, source: str | Path, size: tuple[int, int], reference_size: int) -> FolderSource:
        return cls(GroupedPairs(open_pairs(source)), size, reference_size)

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired:
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


def open_source(
    icons: str | None,
    pairs: str | None,
    kinds: Sequence[PairKind],
    splits: tuple[str, ...],
    size: tuple[int, int],
    reference_size: int,
) -> PairSource:
    """Icons of some splits, or a folder or tars of pairs."""
    if (icons is None) == (pairs is None):
        raise ValueError("Give icons or pairs: the icon world, or a folder or tars of style and content groups.")
    if pairs is None:
        return icon_world().paired(icons, splits, size, reference_size)  # type: ignore[attr-defined]
    source = FolderSource.open(pairs, size, reference_size)
    source.pairs.need(kinds)
    return source
