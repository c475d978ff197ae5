"""Two pictures that share a style or a content, never one with itself: the paired sets of DEADiff (arXiv:2403.06951,
section 3.3).

A style pair is two pictures of one style group (in the paper: of one prompt); a content pair is two pictures of one
content group (one subject word) in different styles. A row may name its references itself (`style_file_names`,
`content_file_names` or `subject_file_names`) instead.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from condit.data.images import ImageSource
from condit.data.pairs import Pair, Pairs, TarPairs

Kind = Literal["style", "content", "reconstruction"]
KINDS: tuple[Kind, ...] = ("style", "content", "reconstruction")
ROLES: dict[Kind, tuple[str, ...]] = {"style": ("style",), "content": ("content", "subject"), "reconstruction": ()}
TRIES = 100


class GroupedPairs:
    """Draws (target, reference) from a set of pairs. At first it reads what metadata says, and no picture."""

    def __init__(self, pairs: Pairs):
        if not len(pairs):
            raise ValueError("The set holds no picture.")
        self.pairs = pairs
        facts = [facts_of(pairs, i) for i in range(len(pairs))]
        self.style, self.content = ([groups.get(name) for _, groups in facts] for name in ("style", "content"))
        self.roles = [{kind for kind in KINDS if set(ROLES[kind]) & set(roles)} for roles, _ in facts]
        by_style, by_content = by_name(self.style), by_name(self.content)
        alone = {kind: [[i] for i, roles in enumerate(self.roles) if kind in roles] for kind in KINDS}
        # In the paper a visit to a style group draws two of its pictures, and every picture begins content pairs.
        self.choices: dict[Kind, list[list[int]]] = {
            "style": [rows for rows in by_style.values() if len(rows) > 1] + alone["style"],
            "content": [[i] for rows in by_content.values() for i in rows if self.others("content", i, rows)]
            + alone["content"],
            "reconstruction": [[i] for i in range(len(pairs))],
        }
        self.members = {"style": by_style, "content": by_content}

    def need(self, kinds: Sequence[Kind]) -> None:
        """ValueError unless there are pairs of these kinds."""
        for kind in kinds:
            if not self.choices[kind]:
                raise ValueError(
                    f"The set has no {kind} pair: two rows with the same {kind}_group"
                    f"{' and different style_group' if kind == 'content' else ''}, or {kind}_file_names in a row."
                )

    def others(self, kind: Kind, i: int, rows: Sequence[int]) -> list[int]:
        """Rows of a group that may be the reference of row i."""
        apart = kind == "content" and self.style[i] is not None
        return [j for j in rows if j != i and not (apart and self.style[j] == self.style[i])]

    def draw(self, rng: random.Random, kind: Kind) -> tuple[Pair, ImageSource]:
        """A target and its reference. ValueError if a hundred draws gave one picture twice."""
        for _ in range(TRIES):
            i = rng.choice(rng.choice(self.choices[kind]))
            target = self.pairs[i]
            if kind == "reconstruction":
                return target, target.image
            found = self.partners(rng, kind, i, target)
            if found is not None:
                return target, found
        raise ValueError(
            f"{TRIES} {kind} pairs in a row were one picture twice: does the set name files several times?"
        )

    def partners(self, rng: random.Random, kind: Kind, i: int, target: Pair) -> ImageSource | None:
        """A reference that is not the target's own picture, or None."""
        named = [x for role in ROLES[kind] for x in target.references.get(role, ())]
        name = (self.style if kind == "style" else self.content)[i]
        rows = self.others(kind, i, self.members[kind].get(name, ()) if name is not None else ())
        n = rng.randrange(len(named) + len(rows))
        found = named[n] if n < len(named) else self.pairs[rows[n - len(named)]].image
        return None if same(found, target.image) else found


def facts_of(pairs: Pairs, i: int) -> tuple[Sequence[str], Mapping[str, str]]:
    """Roles and groups of a row."""
    if isinstance(pairs, TarPairs):
        return pairs.facts(i)
    return tuple(pairs[i].references), pairs[i].groups


def by_name(names: Sequence[str | None]) -> dict[str, list[int]]:
    """Name -> rows that bear it."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if name is not None:
            found[name].append(i)
    return dict(found)


def same(a: ImageSource, b: ImageSource) -> bool:
    """Whether two sources are one picture: one file, or the same bytes."""
    if isinstance(a, Path) and isinstance(b, Path):
        return a == b or a.samefile(b)
    return type(a) is type(b) and isinstance(a, bytes) and a == b
