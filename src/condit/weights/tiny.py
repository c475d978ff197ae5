"""Reading the parts of the embedded model from a folder, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from condit.encoders.clip_model import Clip, ClipConfig
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.encoders.text import TinyText
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.weights.files import load_strict, read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_latent(folder: str | Path) -> PatchAutoencoder:
    """A `PatchAutoencoder` from config.json and its weights."""
    folder = Path(folder)
    fields = read_config(folder)
    vae = PatchAutoencoder(PatchAutoencoderConfig(**fields))
    load_strict(vae, floats(read_tensors(folder / WEIGHTS)), source=folder)
    return vae.eval()


def load_clip(folder: str | Path) -> tuple[Clip, ClipTokenizer]:
    """The embedded CLIP and its tokenizer, from a folder in transformers' layout."""
    folder = Path(folder)
    config = ClipConfig.from_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
    with torch.device("meta"):
        clip = Clip(config)
    load_strict(clip, floats(read_tensors(folder / "model.safetensors")), source=folder, assign=True)
    return clip.eval(), ClipTokenizer.load(folder)


def load_text(folder: Path) -> TinyText:
    """The embedded CLIP's text and its canvas, of a model's folder."""
    text = TinyText(*load_clip(folder / "clip"))
    load_strict(text.canvas, floats(read_tensors(folder / "canvas" / WEIGHTS)), source=folder / "canvas")
    return text.eval()


def read_config(folder: Path) -> dict:
    """config.json without the keys that only tell who wrote it."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    return {k: v for k, v in json.loads(text).items() if not k.startswith("_") and k != "condit"}


def floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp16 storage to fp32: the embedded models run in fp32 on CPUs."""
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
