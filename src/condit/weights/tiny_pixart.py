"""The embedded PixArt from its folder: `transformer` and `scheduler` in diffusers' layout; the text tower and the
autoencoder are those of the embedded MM-DiT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from condit.backbones.pixart import PixArt
from condit.diffusion.vp import Process
from condit.encoders.image import TinyImage
from condit.encoders.text import TinyWords
from condit.encoders.vae import PatchAutoencoder
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.latent_models import LatentParts
from condit.weights.pixart import load_transformer, tell_pixart
from condit.weights.stable_diffusion import SOLVERS, read_json
from condit.weights.tiny import load_clip, load_latent

# model_index.json of such a folder.
INDEX = {"_class_name": "IconPixArtPipeline", "transformer": "PixArtTransformer2DModel", "text_and_latent": "tiny"}


def load_tiny_pixart(folder: Path, dtype: torch.dtype, name: str | None = None) -> LatentParts:
    """ValueError where the embedded MM-DiT, whose text tower and autoencoder it shares, is not there."""
    if "tiny" not in MODELS:
        raise ValueError(f"{folder} needs text and autoencoder of the model 'tiny', which this installation has not.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if (found := scheduler.get("_class_name")) not in SOLVERS:
        raise ValueError(f"{folder}: the scheduler {found!r} is none of ours: {', '.join(SOLVERS)}.")
    beside = MODELS["tiny"].path
    parts = pixart_parts(
        load_transformer(folder / "transformer"),
        TinyWords(*load_clip(beside / "clip")),
        load_latent(beside / "vae"),
        Process.from_config(scheduler),
        name or folder.name,
    )
    for module in (parts.backbone, parts.text, parts.vae):
        module.to(dtype).eval().requires_grad_(False)  # type: ignore[union-attr]
    return replace(parts, hash=describe_hash(folder), solver=SOLVERS[str(found)])


def pixart_parts(
    transformer: PixArt, words: TinyWords, vae: PatchAutoencoder, process: Process, name: str
) -> LatentParts:
    """What a pipeline draws with: in training, too."""
    side = transformer.config.sample_size * vae.config.patch
    return LatentParts(
        name=name,
        hash="",
        backbone=transformer,
        text=words,
        vae=vae,
        image=TinyImage(words.clip),
        process=process,
        solver="dpm++",
        size=(side, side),
        steps=20,
        guidance=3.0,
        tell=tell_pixart,
    )
