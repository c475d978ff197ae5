"""The embedded UNet from its folder: `unet` and `scheduler` in diffusers' layout; the text tower and the autoencoder
are those of the embedded MM-DiT."""

from __future__ import annotations

from pathlib import Path

import torch

from condit.backbones.unet import UNet
from condit.diffusion.vp import Process
from condit.encoders.image import TinyImage
from condit.encoders.text import TinyTextStates
from condit.encoders.vae import PatchAutoencoder
from condit.weights.files import load_strict
from condit.weights.latent_models import LatentParts, tell_unet
from condit.weights.stable_diffusion import read_folder, read_json, unet_config
from condit.weights.tiny import floats, load_clip, load_latent
from condit.weights.tiny_beside import beside, finished

# model_index.json of such a folder.
INDEX = {"_class_name": "IconUNetPipeline", "unet": "UNet2DConditionModel", "text_and_latent": "tiny"}
STEPS, GUIDANCE = 20, 3.0


def load_tiny_unet(folder: Path, dtype: torch.dtype, name: str | None = None) -> LatentParts:
    """ValueError where the embedded MM-DiT, whose text and autoencoder it shares, is not there."""
    tiny, process = beside(folder)
    unet = UNet(unet_config(read_json(folder / "unet" / "config.json"), folder))
    load_strict(unet, floats(read_folder(folder / "unet")), source=folder / "unet")
    words, vae = TinyTextStates(*load_clip(tiny / "clip")), load_latent(tiny / "vae")
    parts = unet_parts(unet, words, vae, process, name or folder.name)
    return finished(parts, folder, dtype)


def unet_parts(unet: UNet, text: TinyTextStates, vae: PatchAutoencoder, process: Process, name: str) -> LatentParts:
    """What a pipeline draws with: in training, too."""
    side = unet.config.sample_size * vae.config.patch
    return LatentParts(
        name=name,
        hash="",
        backbone=unet,
        text=text,
        vae=vae,
        image=TinyImage(text.clip),
        process=process,
        solver="dpm++",
        size=(side, side),
        steps=STEPS,
        guidance=GUIDANCE,
        tell=tell_unet,
    )
