"""Batches of a step: the randomness of each, and their way to the device."""

from __future__ import annotations

import dataclasses
import random
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def sources(key: str, batches: int | None, accumulate: int, rank: int, processes: int) -> list[random.Random]:
    """The source of randomness of each batch of a process. Those of a process share one, unless the number of `batches`
    that all make together is given: then each batch has its own, so that any process may make it."""
    if batches is None:
        return [random.Random(f"{key}/{rank}")] * accumulate
    return [random.Random(f"{key}/{number}") for number in range(rank, batches, processes)]


def to_device(batch: T, device: torch.device) -> T:
    """A tensor, a tuple of tensors, or a dataclass with its tensors, on the device."""
    return cast(T, _moved(batch, device))


def _moved(batch: object, device: torch.device) -> object:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        return tuple(_moved(value, device) for value in batch)
    if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    return dataclasses.replace(
        batch, **{f.name: _moved(getattr(batch, f.name), device) for f in dataclasses.fields(batch) if f.init}
    )
