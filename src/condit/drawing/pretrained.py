"""`Pipeline.from_pretrained` and `Pipeline.save_pretrained`: loading and saving under diffusers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from condit.drawing.families import AnyParts, Offload
from condit.weights.class_models import ClassifierParts
from condit.weights.load import identify, load_parts
from condit.weights.quantise import Quantise
from condit.weights.save import save_model


class Loaded(Protocol):
    """A pipeline of parts."""

    parts: Any

    def __init__(self, parts: AnyParts, *, offload: Offload | None = None) -> None: ...

    def to(self, device: str | torch.device) -> Self: ...


P = TypeVar("P", bound=Loaded)


def from_pretrained(
    cls: type[P],
    source: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: Offload | None = None,
    quantize: Quantise | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> P:
    """`condit.load` for a model that generates; revision: of a repository. Raises ValueError for a ViT."""
    model = identify(f"{source}@{revision}" if revision else source, variant)
    parts = load_parts(model, dtype=dtype or torch_dtype, device=device, quantize=quantize)
    if isinstance(parts, ClassifierParts):
        raise ValueError(f"{source} is a ViT, which classifies images. Use condit.load.")
    return cls(parts, offload=offload).to(device)


def save_pretrained(pipe: Loaded, folder: str | Path) -> Path:
    """Write the model in diffusers' folder layout, which condit and diffusers load; see `weights.save`."""
    return save_model(pipe.parts, folder)
