"""`condit train recipe.toml`: a recipe names a task, its data and how to train it."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from condit.data.files import read_bounded
from condit.data.locks import locked
from condit.training.fields import first_error
from condit.training.loop import Loop, LoopConfig, Task
from condit.training.plugins import added_tasks
from condit.weights.catalog import MODELS

MAX_RECIPE_BYTES = 1_000_000

log = logging.getLogger(__name__)


# Fields of `[data]` that may name a file or folder.
PLACES = ("model", "icons", "folder", "pairs", "held_out", "init", "tower", "blip", "image_encoder", "vae", "cache")
PLACES += ("faces",)


class Recipe(BaseModel):
    """`task`, `[data]` (see the task's `data_type`) and `[train]`."""

    model_config = ConfigDict(extra="forbid")

    task: str
    data: dict[str, object]
    train: LoopConfig


def tasks() -> dict[str, type[Task]]:
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
    """A checked recipe; ValueError names the field. Paths in `[data]` are relative to the recipe's folder or, where
    nothing is there, to the current one."""
    try:
        recipe = Recipe.model_validate(tomllib.loads(read_bounded(path, MAX_RECIPE_BYTES).decode("utf-8")))
        data = {key: placed(key, value, Path(path).parent) for key, value in recipe.data.items()}
        return recipe.model_copy(update={"data": data})
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}.") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ValueError(f"{path} is not TOML: {error}") from error


def placed(key: str, value: object, folder: Path) -> object:
    """A field of `[data]`, with the path from the recipe's folder where there is such a file."""
    if key not in PLACES or not isinstance(value, str) or value in MODELS or Path(value).is_absolute():
        return value
    return str(folder / value) if (folder / value).exists() else value


def train(path: str | Path, *, out: Path, resume: bool = True) -> dict[str, float]:
    """Run a recipe into `out`; continues exactly where an earlier run stopped. Returns the last validation figures.
    Raises ValueError while another process trains there."""
    recipe = read_recipe(path)
    known, added = tasks(), added_tasks()
    if recipe.task not in known and recipe.task not in added:
        raise ValueError(f"{path}: no task {recipe.task!r}. Known: {', '.join([*known, *added])}.")
    kind = known[recipe.task] if recipe.task in known else added[recipe.task].load()
    make_task = check_data(kind, recipe, path)
    # Of processes that train together, the first holds the lock.
    with locked(out, "training") if os.environ.get("RANK", "0") == "0" else nullcontext():
        # The seed also initialises the weights, so that a recipe determines the whole run.
        torch.manual_seed(recipe.train.seed)
        return Loop(make_task(), recipe.train, out, resume=resume, progress=True).run()


def check_data(kind: type[Task], recipe: Recipe, path: str | Path) -> Callable[[], Task]:
    """A function that makes the task of the recipe's `[data]`. It, or the check before it, raises ValueError that names
    the file and the field that does not fit."""

    @contextmanager
    def errors() -> Iterator[None]:
        try:
            yield
        except (TypeError, ValidationError) as error:
            reason = first_error(error) if isinstance(error, ValidationError) else error
            raise ValueError(f"{path}: [data] does not fit task {recipe.task!r}: {reason}.") from error

    with errors():
        data = None if kind.data_type is None else kind.data_type.model_validate(recipe.data)

    def make() -> Task:
        if data is not None:
            return kind(data)
        with errors():
            return kind(**recipe.data)

    return make
