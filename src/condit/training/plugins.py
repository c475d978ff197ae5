"""Entry points by which other packages add tasks of recipes, and sources of data."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from condit.training.labelled import Label, Labelled
    from condit.training.paired import PairSource

TASKS, DATA = "condit.tasks", "condit.data"


class IconWorld(Protocol):
    """The module of an icon world: labelled images, and pairs that share a style or a subject."""

    def labelled(self, path: str, label: Label, size: tuple[int, int], *, held_out: str) -> Labelled: ...

    def paired(self, path: str, splits: tuple[str, ...], size: tuple[int, int], reference_size: int) -> PairSource: ...


def added_tasks() -> dict[str, EntryPoint]:
    """Name of a recipe's task -> the entry point of its class."""
    return {entry.name: entry for entry in entry_points(group=TASKS)}


def icon_world() -> IconWorld:
    """The module that opens the icon world (`icons =` of a recipe). Raises ValueError without the laboratory, which is
    part of a checkout."""
    for entry in entry_points(group=DATA, name="icons"):
        return entry.load()
    raise ValueError(
        "icons = needs the icon world, which is part of the laboratory and not of the installed package. Use a folder "
        "of images or pairs, or install the laboratory from a checkout: pip install -e lab"
    )
