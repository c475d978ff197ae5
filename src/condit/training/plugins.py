"""Entry points by which other packages add tasks of recipes, and sources of data."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

TASKS, DATA = "condit.tasks", "condit.data"


def added_tasks() -> dict[str, EntryPoint]:
    """Name of a recipe's task -> the entry point of its class."""
    return {entry.name: entry for entry in entry_points(group=TASKS)}


def icon_world() -> ModuleType:
    """The module that opens the icon world (`icons =` of a recipe): `labelled(...)` and `paired(...)`.
    Raises ValueError without the laboratory, which is part of a checkout."""
    for entry in entry_points(group=DATA, name="icons"):
        return entry.load()
    raise ValueError(
        "icons = needs the icon world, which is part of the laboratory and not of the installed package. Use a folder "
        "of images or pairs, or install the laboratory from a checkout: pip install -e lab"
    )
