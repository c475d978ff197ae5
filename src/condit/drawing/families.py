"""Which family of models loaded parts belong to."""

from __future__ import annotations

from importlib import import_module
from typing import Literal

from condit.drawing.model import Model
from condit.weights.class_models import ClassParts, PixelParts
from condit.weights.latent_models import LatentParts
from condit.weights.parts import Parts

AnyParts = Parts | LatentParts | ClassParts | PixelParts
Offload = Literal["encoders", "blocks"]
FAMILIES = {
    Parts: ("flow", "FlowModel"),
    LatentParts: ("vp", "VPModel"),
    ClassParts: ("classes", "ClassModel"),
    PixelParts: ("pixels", "PixelModel"),
}


def make_model(parts: AnyParts, offload: Offload | None) -> Model:
    """The model of these parts. Its module is imported when it is needed. Raises ValueError for an offload that the
    family does not have."""
    if offload is not None and not isinstance(parts, Parts | LatentParts):
        raise ValueError(
            f"offload={offload!r} is for FLUX.1, Stable Diffusion and PixArt; {parts.name} does not support it."
        )
    module, name = FAMILIES[type(parts)]
    family = getattr(import_module(f"condit.drawing.{module}"), name)
    return family(parts, offload) if offload else family(parts)
