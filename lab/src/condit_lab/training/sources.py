"""The icon world as a source of data for the tasks of `condit.training`: labelled images and pairs."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from condit.data.grouped import PAIR_KINDS, PairKind
from condit.data.images import to_tensor
from condit.training.labelled import Images, Label, Labelled
from condit.training.paired import Paired, resized
from condit_lab.icons.captions import plain_caption
from condit_lab.icons.world import GROUPS, SIZE, TRAIN_LICENCES, concept_names, on_white
from condit_lab.training.icon_batches import IconSet
from condit_lab.training.referenced import NAMELESS


def labelled(path: str, label: Label, size: tuple[int, int], *, held_out: str) -> Labelled:
    """Icons that may be trained on, labelled by style, concept (`base`) or group; held-out ones of known classes."""
    if label not in get_args(Label):
        raise ValueError(f"label must be one of {', '.join(get_args(Label))}; found {label!r}.")
    train, held = (
        IconSet.open(path, splits=(split,), groups=GROUPS, licences=TRAIN_LICENCES) for split in ("train", held_out)
    )
    names = {getattr(icon, label): getattr(icon, label) for icon in train.icons}
    if label == "base":
        names = concept_names(train.icons)
    numbers = {name: i for i, name in enumerate(sorted(names))}

    def pictures(icons: IconSet) -> Images:
        chosen = [i for i, icon in enumerate(icons.icons) if getattr(icon, label) in numbers]

        def read(indices: Sequence[int]) -> Tensor:
            rows = [chosen[i] for i in indices]
            if size == (SIZE, SIZE):
                return icons.images(rows)
            return torch.stack([to_tensor(on_white(icons.rgba[i]), size, fit="pad") for i in rows])

        digest = hashlib.sha256(repr(size).encode())
        for i in chosen:
            digest.update(icons.rgba[i].data)
        members = [icons.icons[i].member for i in chosen]
        labels = [numbers[getattr(icons.icons[i], label)] for i in chosen]
        return Images(members, labels, read, digest.hexdigest())

    return Labelled([names[name] for name in numbers], pictures(train), pictures(held))


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
        self.rows: dict[PairKind, list[int]] = {
            "style": [i for i in rows if len(by_style[icons.icons[i].style]) > 1],
            "content": [i for i in rows if len(by_base[icons.icons[i].base]) > 1],
            "reconstruction": list(rows),
        }
        for kind in PAIR_KINDS:
            if not self.rows[kind]:
                raise ValueError(f"These icons have no {kind} pair. Take more styles or concepts.")

    def batch(self, rng: random.Random, kind: PairKind, size: int) -> Paired:
        chosen = [rng.choice(self.rows[kind]) for _ in range(size)]
        others = [self.partner(rng, kind, i) for i in chosen]
        captions = [self.caption(rng, kind, i) for i in chosen]
        images, references = (resized(self.icons.images(rows), side) for rows, side in self.sizes(chosen, others))
        return Paired(kind, images, references, captions)

    def sizes(self, chosen: list[int], others: list[int]):
        return (chosen, self.size), (others, (self.reference_size, self.reference_size))

    def partner(self, rng: random.Random, kind: PairKind, i: int) -> int:
        """The reference of icon i; itself for reconstruction alone."""
        if kind == "reconstruction":
            return i
        one, icons = self.icons.icons[i], self.icons
        same = icons.by_style[one.style] if kind == "style" else icons.by_base[one.base]
        apart = "base" if kind == "style" else "style"
        return rng.choice([j for j in same if getattr(icons.icons[j], apart) != getattr(one, apart)])

    def caption(self, rng: random.Random, kind: PairKind, i: int) -> str:
        if kind == "style":
            return self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.9, p_tags=0.1)
        if kind == "content" and rng.random() < self.nameless:
            icon = self.icons.icons[i]
            return plain_caption(icon).replace(icon.label, rng.choice(NAMELESS), 1)
        return self.icons.caption(rng, i, p_empty=0.0, p_no_style=0.0, p_tags=0.1)


def paired(path: str, splits: tuple[str, ...], size: tuple[int, int], reference_size: int) -> IconSource:
    """Pairs of the icons of some splits that may be trained on."""
    chosen = IconSet.open(path, splits=splits, groups=GROUPS, licences=TRAIN_LICENCES)
    return IconSource(chosen, size, reference_size)
