"""Names of classes: the 1000 of ImageNet-1k in their official order, and those of a model with other classes.

imagenet.tsv has one line for each class: its WordNet id and the synonyms of that synset (Russakovsky et al. 2015,
arXiv:1409.0575). Six labels belong to two classes each; a word in brackets distinguishes them: crane (bird).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

_FILE = Path(__file__).with_name("imagenet.tsv")


@dataclass(frozen=True)
class ClassNames:
    """names[i]: the names of class i, its label first. ids[i]: its WordNet id, or ids is empty."""

    names: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, labels: Iterable[str]) -> ClassNames:
        """One label for each class; the parts between its commas are names too ("tench, Tinca tinca")."""
        return cls(tuple((label, *(part.strip() for part in label.split(",") if "," in label)) for label in labels))

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> str:
        """The first name of a class."""
        return self.names[index][0]

    def index(self, name: str) -> int:
        """The class of a label, else of a synonym, an id or a number in digits; case and underscores do not matter.

        ValueError for an unknown name, with similar names, or for a name of more than one class."""
        key = _fold(name)
        for table in (self._labels, self._synonyms):
            classes = table.get(key, ())
            if len(classes) == 1:
                return classes[0]
            if classes:
                choices = " or ".join(f"{self.label(i)!r} ({i})" for i in classes)
                raise ValueError(f"{name!r} names {len(classes)} classes: give {choices}, by label or by number.")
        if name.strip().isdecimal():
            if int(name) < len(self):
                return int(name)
            raise ValueError(f"No class {name!r}: they are numbered 0 to {len(self) - 1}.")
        raise ValueError(f"No class {name!r} among {len(self)}. {self._advice(key)}")

    @cached_property
    def _labels(self) -> dict[str, list[int]]:
        return _table((names[0],) for names in self.names)

    @cached_property
    def _synonyms(self) -> dict[str, list[int]]:
        ids = self.ids or [""] * len(self)
        return _table((*names, id) if id else names for names, id in zip(self.names, ids, strict=True))

    def _advice(self, key: str) -> str:
        words = [name for name in self._synonyms if key and f" {key} " in f" {name} "]
        near = list(dict.fromkeys([*difflib.get_close_matches(key, self._synonyms, n=5), *words]))[:5]
        if not near:
            return f"The first are {', '.join(repr(self.label(i)) for i in range(min(3, len(self))))}."
        return "Near: " + ", ".join(f"{name!r} ({self._synonyms[name][0]})" for name in near) + "."


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _table(rows: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, names in enumerate(rows):
        for key in {_fold(name) for name in names}:
            table.setdefault(key, []).append(index)
    return table


@cache
def imagenet() -> ClassNames:
    """The 1000 classes of ImageNet-1k as DiT, DiffiT and ViT number them: 207 is 'golden retriever'."""
    lines = [line.split("\t") for line in _FILE.read_text(encoding="utf-8").splitlines()]
    names = (tuple(text.split(", ")) for _, text in lines)
    # The whole line is a name too, as other libraries print it as the label.
    return ClassNames(
        tuple((*parts, ", ".join(part for part in parts if "(" not in part)) for parts in names),
        tuple(id for id, _ in lines),
    )
