"""The embedded UNet from its folder, and how it is told a text: SDXL's network beside the canvas of the embedded CLIP.

A folder holds `unet` and `scheduler` in diffusers' layout; text and autoencoder are those of the embedded MM-DiT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.backbones.unet import UNet
from condit.controls.control import Control
from condit.diffusion.vp import Process
from condit.encoders.image import TinyImage
from condit.encoders.text import Text, TinyText
from condit.encoders.vae import PatchAutoencoder, unpack
from condit.nn.lora import LowRank
from condit.weights.files import load_strict
from condit.weights.latent_models import Frame, LatentParts, Network, tell_unet
from condit.weights.stable_diffusion import read_folder, read_json, unet_config
from condit.weights.tiny import floats, load_latent, load_text
from condit.weights.tiny_beside import beside, finished

# model_index.json of such a folder.
INDEX = {"_class_name": "IconUNetPipeline", "unet": "UNet2DConditionModel", "text_and_latent": "tiny"}
GRID = (8, 8)  # of the canvas, in tokens of 2 x 2 latent cells
STEPS, GUIDANCE = 20, 3.0


def load_tiny_unet(folder: Path, dtype: torch.dtype, name: str | None = None) -> LatentParts:
    """ValueError where the embedded MM-DiT, whose text and autoencoder it shares, is not there."""
    tiny, process = beside(folder)
    unet = UNet(unet_config(read_json(folder / "unet" / "config.json"), folder))
    load_strict(unet, floats(read_folder(folder / "unet")), source=folder / "unet")
    parts = unet_parts(unet, load_text(tiny), load_latent(tiny / "vae"), process, name or folder.name)
    return finished(parts, folder, dtype)


def unet_parts(unet: UNet, text: TinyText, vae: PatchAutoencoder, process: Process, name: str) -> LatentParts:
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
        tell=tell_canvas,
    )


def tell_canvas(unet: UNet, text: Text, frame: Frame) -> Network:
    """The UNet that sees a text's canvas beside the latents, stretched to their size."""
    told = tell_unet(unet, text, frame)
    assert text.canvas is not None
    canvas = unpack(text.canvas, GRID)

    def network(x: Tensor, t: Tensor, lora: LowRank | None, controls: Sequence[Control]) -> Tensor:
        beside = canvas if canvas.shape[2:] == x.shape[2:] else F.interpolate(canvas, size=x.shape[2:], mode="bilinear")
        return told(torch.cat([x, beside.to(x)], 1), t, lora, controls)

    return network
