"""Batches of image pairs for DEADiff (arXiv:2403.06951, section 3.3), from the icon world, or from a folder or tars of
style groups and content groups."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.data.grouped import GroupedPairs, PairKind
from condit.data.images import ImageSource, load_image, to_tensor
from condit.data.pairs import Pairs, ShardPairs, open_pairs
from condit.encoders.clip_patches import resize_antialiased
from condit.training.plugins import icon_world
from condit.weights.files import check_values, read_tensors
from condit.weights.latent_models import Frame


@dataclass
class Paired:
    """Targets (B, 3, H, W) and references (B, 3, S, S) in [-1, 1], and the targets' captions. kind: what a target and
    its reference share. frames: the targets' crops; None: they are not cropped."""

    kind: PairKind
    images: Tensor
    references: Tensor
    captions: list[str]
    frames: list[Frame] | None = None


class PairSource(Protocol):
    """A source of batches, which are pure functions of `rng`."""

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired: ...


@dataclass(frozen=True)
class Faces:
    """The vector (E,) of the face in each image, by the image's path relative to `folder`."""

    folder: Path
    vectors: Mapping[str, Tensor]

    @classmethod
    def read(cls, file: str | Path) -> Faces:
        """A safetensors file next to the images or above them. ValueError unless it holds vectors of one length."""
        vectors = read_tensors(file)
        check_values(vectors, file)
        shapes = sorted({tuple(vector.shape) for vector in vectors.values()})
        if [len(shape) for shape in shapes] != [1]:
            raise ValueError(f"{file}: expected a vector (E,) for each image, all of one length; found {shapes[:3]}.")
        return cls(Path(file).resolve().parent, {name: vector.float() for name, vector in vectors.items()})

    @property
    def width(self) -> int:
        return len(next(iter(self.vectors.values())))

    def of(self, source: ImageSource) -> Tensor:
        """ValueError for an image without a vector, and for one that is no file, as in tars."""
        name = os.path.relpath(source.resolve(), self.folder) if isinstance(source, Path) else "an image of a tar"
        if name not in self.vectors:
            raise ValueError(
                f"{self.folder}: no face vector for {name}; found {', '.join(list(self.vectors)[:2])}, ..."
            )
        return self.vectors[name]


@dataclass(frozen=True)
class FolderSource:
    """Images of `GroupedPairs`: targets cropped to `size`, references resized as in the released training code. faces:
    their vectors (B, E) take the references' place."""

    pairs: GroupedPairs
    size: tuple[int, int]
    reference_size: int
    faces: Faces | None = None

    def check(self, kinds: Sequence[PairKind]) -> None:
        """ValueError unless the set has pairs of each of these kinds."""
        self.pairs.need(kinds)

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired:
        sampled = [self.pairs.draw(rng, kind) for _ in range(size)]
        targets = [load_image(target.image) for target, _ in sampled]
        images = torch.stack([to_tensor(image, self.size, fit="crop") for image in targets])
        references = torch.cat([self.reference(source) for _, source in sampled])
        frames = [cropped((image.height, image.width), self.size) for image in targets]
        return Paired(kind, images, references, [target.text for target, _ in sampled], frames)

    def reference(self, source: ImageSource) -> Tensor:
        """(1, 3, S, S), from the whole image; (1, E) of its face."""
        if self.faces is not None:
            return self.faces.of(source)[None]
        image = load_image(source)
        whole = to_tensor(image, (image.height, image.width))[None]
        return resize_antialiased(whole, (self.reference_size, self.reference_size))


class ShardSource:
    """Pairs of tars with a card. The rows of a batch come from one tar, drawn by its number of rows, so that a process
    reads as many tars as it makes batches, whatever the size of the set. Groups are those of a tar."""

    def __init__(self, pairs: ShardPairs, size: tuple[int, int], reference_size: int):
        self.counts = [count for _, count in pairs.shards]
        self.shard = lru_cache(2)(lambda number: FolderSource(GroupedPairs(pairs.shard(number)), size, reference_size))

    def check(self, kinds: Sequence[PairKind]) -> None:
        """ValueError unless the first tar has pairs of each of these kinds."""
        self.shard(0).check(kinds)

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired:
        return self.shard(rng.choices(range(len(self.counts)), self.counts)[0]).batch(rng, kind, size)


def open_folder(
    pairs: Pairs, size: tuple[int, int], reference_size: int, faces: Faces | None = None
) -> FolderSource | ShardSource:
    """The source of batches of a set. ValueError for faces with tars, whose images have no path."""
    if not isinstance(pairs, ShardPairs):
        return FolderSource(GroupedPairs(pairs), size, reference_size, faces)
    if faces is not None:
        raise ValueError("faces are of the images of a folder: found tars. Unpack them.")
    return ShardSource(pairs, size, reference_size)


def cropped(original: tuple[int, int], size: tuple[int, int]) -> Frame:
    """The size conditioning of an image of (height, width) that is resized to cover `size` and centre-cropped: SDXL's
    original size, and the crop's corner in the resized image (arXiv:2307.01952, section 2.2)."""
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
    faces: Faces | None = None,
) -> PairSource:
    """Pairs of icons of some splits, or of a folder or tars. faces: of the images of a folder."""
    if icons is not None and pairs is None and faces is None:
        return icon_world().paired(icons, splits, size, reference_size)
    if pairs is not None and icons is None:
        source = open_folder(open_pairs(pairs), size, reference_size, faces)
        source.check(kinds)
        return source
    if faces is not None:
        raise ValueError("faces are of the images of a folder: set pairs, not icons.")
    raise ValueError("Set either icons (an icon world) or pairs (a folder or tars of style and content groups).")
