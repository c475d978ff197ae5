"""The embedded PixArt from its folder: `transformer` and `scheduler` in diffusers' layout; the text tower and the
autoencoder are those of the embedded MM-DiT."""

from __future__ import annotations

from pathlib import Path

import torch

from condit.backbones.pixart import PixArt
from condit.diffusion.vp import Process
from condit.encoders.image import TinyImage
from condit.encoders.text import TinyTextStates
from condit.encoders.vae import PatchAutoencoder
from condit.weights.latent_models import LatentParts
from condit.weights.pixart import load_transformer, tell_pixart
from condit.weights.tiny import load_clip, load_latent
from condit.weights.tiny_beside import beside, finished

# model_index.json of such a folder.
INDEX = {"_class_name": "IconPixArtPipeline", "transformer": "PixArtTransformer2DModel", "text_and_latent": "tiny"}


def load_tiny_pixart(folder: Path, dtype: torch.dtype, name: str | None = None) -> LatentParts:
    """ValueError where the embedded MM-DiT, whose text tower and autoencoder it shares, is not there."""
    tiny, process = beside(folder)
    words, vae = TinyTextStates(*load_clip(tiny / "clip")), load_latent(tiny / "vae")
    transformer = load_transformer(folder / "transformer")
    return finished(pixart_parts(transformer, words, vae, process, name or folder.name), folder, dtype)


def pixart_parts(
    transformer: PixArt, words: TinyTextStates, vae: PatchAutoencoder, process: Process, name: str
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
