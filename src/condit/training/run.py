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

log = logging.getLogger(__name__)


class Recipe(BaseModel):
    """`task`, `[data]` (its arguments) and `[train]`."""

    model_config = ConfigDict(extra="forbid")

    task: str
    data: dict[str, Any]
    train: LoopConfig


def tasks() -> dict[str, Callable[..., Task]]:
    """Task name of a recipe -> class."""
    from condit.training.adapters import StyleTask, TokenTask
    from condit.training.class_conditional import ClassConditionalTask
    from condit.training.classify import ClassifyTask
    from condit.training.clip import ClipTask
    from condit.training.deadiff import DEADiffTask
    from condit.training.ip_adapter import IPAdapterTask
    from condit.training.joint import JointTask
    from condit.training.latent import LatentTask
    from condit.training.omini import OminiTask
    from condit.training.pixart import PixArtTask
    from condit.training.pixels import PixelTask
    from condit.training.text_to_image import TextToImageTask
    from condit.training.unet import UNetTask
    from condit.training.unet_joint import UNetJointTask

    return {
        "latent": LatentTask,
        "clip": ClipTask,
        "text-to-image": TextToImageTask,
        "text-to-image-pixart": PixArtTask,
        "text-to-image-unet": UNetTask,
        "text-and-style-unet": UNetJointTask,
        "text-and-style": JointTask,
        "style": StyleTask,
        "tokens": TokenTask,
        "omini": OminiTask,
        "class-conditional": ClassConditionalTask,
        "classify": ClassifyTask,
        "deadiff": DEADiffTask,
        "ip-adapter": IPAdapterTask,
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
    known = tasks()
    if recipe.task not in known:
        raise ValueError(f"{path}: no task {recipe.task!r}. Known: {', '.join(known)}.")
    # Weights are drawn from the seed too, so that a recipe says all.
    torch.manual_seed(recipe.train.seed)
    try:
        task = known[recipe.task](**recipe.data)
    except TypeError as error:
        raise ValueError(f"{path}: [data] does not fit task {recipe.task!r}: {error}.") from error
    return Loop(task, recipe.train, out, resume=resume, progress=sys.stderr.isatty()).run()
