"""What the embedded UNet and PixArt have in common: the text tower and the autoencoder of the embedded MM-DiT, and a
scheduler beside their own network that says how they are drawn with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from condit.diffusion.vp import Process
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.latent_models import LatentParts
from condit.weights.stable_diffusion import SOLVERS, read_json


def beside(folder: Path) -> tuple[Path, Process]:
    """The MM-DiT's folder and the model's noise. ValueError where the MM-DiT is not there."""
    if "tiny" not in MODELS:
        raise ValueError(f"{folder} needs text and autoencoder of the model 'tiny', which this installation has not.")
    return MODELS["tiny"].path, Process.from_config(_scheduler(folder))


def finished(parts: LatentParts, folder: Path, dtype: torch.dtype) -> LatentParts:
    """Frozen parts in their dtype, with the folder's hash and the sampler that its scheduler names; ValueError for a
    scheduler that is none of ours."""
    found = str(_scheduler(folder).get("_class_name"))
    if found not in SOLVERS:
        raise ValueError(f"{folder}: the scheduler {found!r} is none of ours: {', '.join(SOLVERS)}.")
    for module in (parts.backbone, parts.text, parts.vae):
        module.to(dtype).eval().requires_grad_(False)  # type: ignore[union-attr]
    return replace(parts, hash=describe_hash(folder), solver=SOLVERS[found])


def _scheduler(folder: Path) -> dict:
    return read_json(folder / "scheduler" / "scheduler_config.json")
