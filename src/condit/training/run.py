"""`condit train recipe.toml`: a recipe names a task, its arguments and how to train it."""

from __future__ import annotations

import logging
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from condit.training.loop import Loop, LoopConfig, Task
from condit.training.plugins import added_tasks

log = logging.getLogger(__name__)


class Recipe(BaseModel):
    """`task`, `[data]` (its arguments) and `[train]`."""

    model_config = ConfigDict(extra="forbid")

    task: str
    data: dict[str, Any]
    train: LoopConfig


def tasks() -> dict[str, Callable[..., Task]]:
    """Task name of a recipe -> class."""
    from condit.training.class_conditional import ClassConditionalTask
    from condit.training.classify import ClassifyTask
    from condit.training.deadiff import DEADiffTask
    from condit.training.ip_adapter import IPAdapterTask
    from condit.training.omini import OminiTask
    from condit.training.pixels import PixelTask

    return {
        "omini": OminiTask,
        "ip-adapter": IPAdapterTask,
        "deadiff": DEADiffTask,
        "class-conditional": ClassConditionalTask,
        "classify": ClassifyTask,
        "pixels": PixelTask,
    }


def read_recipe(path: str | Path) -> Recipe:
    """A checked recipe; ValueError names the field."""
    try:
        return Recipe(**tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']} (found {first.get('input')!r}).") from error


def train(path: str | Path, *, out: Path, resume: bool = True) -> dict[str, float]:
    """Run a recipe into `out`; continues exactly where an earlier run stopped. Returns the last validation figures."""
    recipe = read_recipe(path)
    known, added = tasks(), added_tasks()
    if recipe.task not in known and recipe.task not in added:
        raise ValueError(f"{path}: no task {recipe.task!r}. Known: {', '.join([*known, *added])}.")
    make = known[recipe.task] if recipe.task in known else added[recipe.task].load()
    # Weights are drawn from the seed too, so that a recipe says all.
    torch.manual_seed(recipe.train.seed)
    try:
        task = make(**recipe.data)
    except TypeError as error:
        raise ValueError(f"{path}: [data] does not fit task {recipe.task!r}: {error}.") from error
    return Loop(task, recipe.train, out, resume=resume, progress=sys.stderr.isatty()).run()
