"""The embedded text-to-icon models from their folders, in fp32. The UNet and the PixArt have `unet` or `transformer`
and `scheduler` in diffusers' layout; they share the text tower and the autoencoder of the MM-DiT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from condit.backbones.pixart import PixArt
from condit.backbones.unet import UNet
from condit.diffusion.vp import Process
from condit.encoders.clip_model import Clip, ClipConfig
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.encoders.image import TinyImage
from condit.encoders.text import TinyText, TinyTextStates
from condit.encoders.vae import PatchAutoencoder
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.files import Json, load_strict, read_tensors
from condit.weights.flux import load_mmdit
from condit.weights.folders import WEIGHTS, floats, read_folder, read_json
from condit.weights.latent_models import LatentParts, tell_unet
from condit.weights.parts import Parts
from condit.weights.pixart import load_transformer, tell_pixart
from condit.weights.stable_diffusion import SOLVERS, unet_config
from condit.weights.vae import load_latent

# model_index.json of the folders of the UNet and the PixArt.
UNET_INDEX = {"_class_name": "IconUNetPipeline", "unet": "UNet2DConditionModel", "text_and_latent": "tiny"}
PIXART_INDEX = {
    "_class_name": "IconPixArtPipeline",
    "transformer": "PixArtTransformer2DModel",
    "text_and_latent": "tiny",
}
STEPS, GUIDANCE = 20, 3.0


def load_clip(folder: str | Path) -> tuple[Clip, ClipTokenizer]:
    """The embedded CLIP and its tokenizer, from a folder in transformers' layout."""
    folder = Path(folder)
    config = ClipConfig.from_fields(read_json(folder / "config.json"), folder)
    with torch.device("meta"):
        clip = Clip(config)
    load_strict(clip, floats(read_tensors(folder / "model.safetensors")), source=folder, assign=True)
    return clip.eval(), ClipTokenizer.load(folder)


def load_text(folder: Path) -> TinyText:
    """The embedded CLIP's text tower and its canvas, from a model's folder."""
    text = TinyText(*load_clip(folder / "clip"))
    load_strict(text.canvas, floats(read_tensors(folder / "canvas" / WEIGHTS)), source=folder / "canvas")
    return text.eval()


def load_tiny(name: str, folder: Path, dtype: torch.dtype) -> Parts:
    """The MM-DiT; only the transformer is in `dtype`."""
    text = load_text(folder)
    settings = read_json(folder / "transformer" / "config.json")["condit"]
    return Parts(
        name=name,
        hash=describe_hash(folder),
        backbone=load_mmdit(folder / "transformer", floats).to(dtype),
        text=text,
        vae=load_latent(folder / "vae"),
        image=TinyImage(text.clip).eval(),
        prediction=settings["prediction"],
        shift=settings["shift"],
        eta=settings.get("eta", 0.0),
        size=(128, 128),
        steps=STEPS,
        guidance=GUIDANCE,
        distilled=False,
    )


def load_tiny_unet(folder: Path, dtype: torch.dtype, name: str) -> LatentParts:
    """ValueError without the embedded MM-DiT, or for a scheduler that condit does not have."""
    unet = UNet(unet_config(read_json(folder / "unet" / "config.json"), folder))
    load_strict(unet, floats(read_folder(folder / "unet")), source=folder / "unet")
    return _load_latent_parts(unet, folder, dtype, name)


def load_tiny_pixart(folder: Path, dtype: torch.dtype, name: str) -> LatentParts:
    """ValueError without the embedded MM-DiT, or for a scheduler that condit does not have."""
    return _load_latent_parts(load_transformer(folder / "transformer"), folder, dtype, name)


def latent_parts(
    network: UNet | PixArt, words: TinyTextStates, vae: PatchAutoencoder, process: Process, name: str
) -> LatentParts:
    """What a pipeline generates with, in training too."""
    side = network.config.sample_size * vae.config.patch
    return LatentParts(
        name=name,
        hash="",
        backbone=network,
        text=words,
        vae=vae,
        image=TinyImage(words.clip),
        process=process,
        solver="dpm++",
        size=(side, side),
        steps=STEPS,
        guidance=GUIDANCE,
        tell=tell_unet if isinstance(network, UNet) else tell_pixart,
    )


def _load_latent_parts(network: UNet | PixArt, folder: Path, dtype: torch.dtype, name: str) -> LatentParts:
    """The frozen parts in `dtype`, with the folder's hash and the sampler that its scheduler names."""
    if "tiny" not in MODELS:
        raise ValueError(f"{folder} needs text and autoencoder of the model 'tiny', which is not installed.")
    scheduler: Json = read_json(folder / "scheduler" / "scheduler_config.json")
    solver = SOLVERS.get(str(scheduler.get("_class_name")))
    if solver is None:
        known = ", ".join(SOLVERS)
        raise ValueError(f"{folder}: unsupported scheduler {scheduler.get('_class_name')!r}; supported are {known}.")
    tiny = MODELS["tiny"].path
    words, vae = TinyTextStates(*load_clip(tiny / "clip")), load_latent(tiny / "vae")
    for module in (network, words, vae):
        module.to(dtype).eval().requires_grad_(False)
    parts = latent_parts(network, words, vae, Process.from_config(scheduler), name)
    return replace(parts, hash=describe_hash(folder), solver=solver)
