"""Pairs of different images that share a style or a content: the paired sets of DEADiff (arXiv:2403.06951, section
3.3).

A style pair is two images of one style group (in the paper: of one prompt); a content pair is two images of one content
group (one subject word) in different styles. A row may name its references itself instead (`style_file_names`,
`content_file_names` or `subject_file_names`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from condit.data.images import ImageSource
from condit.data.pairs import Pair, Pairs, TarPairs

PairKind = Literal["style", "content", "reconstruction"]
PAIR_KINDS: tuple[PairKind, ...] = ("style", "content", "reconstruction")
ROLES: dict[PairKind, tuple[str, ...]] = {"style": ("style",), "content": ("content", "subject"), "reconstruction": ()}
TRIES = 100


class GroupedPairs:
    """Random pairs (target, reference) of a set. The constructor reads metadata only, no image. ValueError for an empty
    set."""

    def __init__(self, pairs: Pairs):
        if not len(pairs):
            raise ValueError("The set has no image.")
        self.pairs = pairs
        metadata = [roles_and_groups(pairs, i) for i in range(len(pairs))]
        self.style, self.content = ([groups.get(name) for _, groups in metadata] for name in ("style", "content"))
        self.roles = [{kind for kind in PAIR_KINDS if set(ROLES[kind]) & set(roles)} for roles, _ in metadata]
        by_style, by_content = by_name(self.style), by_name(self.content)
        named = {kind: [[i] for i, roles in enumerate(self.roles) if kind in roles] for kind in PAIR_KINDS}
        # In the paper, a style group yields one pair of its images, and every image is the target of content pairs.
        self.choices: dict[PairKind, list[list[int]]] = {
            "style": [rows for rows in by_style.values() if len(rows) > 1] + named["style"],
            "content": [[i] for rows in by_content.values() for i in rows if self.others("content", i, rows)]
            + named["content"],
            "reconstruction": [[i] for i in range(len(pairs))],
        }
        self.members = {"style": by_style, "content": by_content}

    def need(self, kinds: Sequence[PairKind]) -> None:
        """ValueError unless the set has pairs of each of these kinds."""
        for kind in kinds:
            if not self.choices[kind]:
                raise ValueError(
                    f"The set has no {kind} pair: two rows with the same {kind}_group"
                    f"{' and different style_group' if kind == 'content' else ''}, or {kind}_file_names in a row."
                )

    def others(self, kind: PairKind, i: int, rows: Sequence[int]) -> list[int]:
        """Rows of a group that may be the reference of row i."""
        other_style = kind == "content" and self.style[i] is not None
        return [j for j in rows if j != i and not (other_style and self.style[j] == self.style[i])]

    def draw(self, rng: random.Random, kind: PairKind) -> tuple[Pair, ImageSource]:
        """A random target and its reference. ValueError if a hundred draws gave the same image twice."""
        for _ in range(TRIES):
            i = rng.choice(rng.choice(self.choices[kind]))
            target = self.pairs[i]
            if kind == "reconstruction":
                return target, target.image
            reference = self.draw_reference(rng, kind, i, target)
            if reference is not None:
                return target, reference
        raise ValueError(
            f"{TRIES} {kind} pairs in a row were the same image twice: does the set name a file more than once?"
        )

    def draw_reference(self, rng: random.Random, kind: PairKind, i: int, target: Pair) -> ImageSource | None:
        """A random reference, or None if it is the target's own image."""
        named = [x for role in ROLES[kind] for x in target.references.get(role, ())]
        name = (self.style if kind == "style" else self.content)[i]
        rows = self.others(kind, i, self.members[kind].get(name, ()) if name is not None else ())
        n = rng.randrange(len(named) + len(rows))
        reference = named[n] if n < len(named) else self.pairs[rows[n - len(named)]].image
        return None if same(reference, target.image) else reference


def roles_and_groups(pairs: Pairs, i: int) -> tuple[Sequence[str], Mapping[str, str]]:
    """The roles and groups of a row, without its images where possible."""
    if isinstance(pairs, TarPairs):
        return pairs.roles_and_groups(i)
    return tuple(pairs[i].references), pairs[i].groups


def by_name(names: Sequence[str | None]) -> dict[str, list[int]]:
    """Name -> its rows."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if name is not None:
            rows[name].append(i)
    return dict(rows)


def same(a: ImageSource, b: ImageSource) -> bool:
    """Whether two sources are the same file or the same bytes."""
    if isinstance(a, Path) and isinstance(b, Path):
        return a == b or a.samefile(b)
    return type(a) is type(b) and isinstance(a, bytes) and a == b
