"""Reading the parts of the embedded model from a folder, in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from condit.encoders.text import TinyText
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.weights.files import load_strict, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_latent(folder: str | Path) -> PatchAutoencoder:
    """A `PatchAutoencoder` from config.json and its weights."""
    folder = Path(folder)
    fields = read_config(folder)
    vae = PatchAutoencoder(PatchAutoencoderConfig(**fields))
    load_strict(vae, floats(read_tensors(folder / WEIGHTS)), source=folder)
    return vae.eval()


def load_clip(folder: str | Path) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The embedded CLIP and its tokenizer, in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    # Not from_pretrained: it draws a progress bar, and the first thing a user sees must be ours.
    config = CLIPConfig.from_json_file(str(Path(folder) / "config.json"))
    config._attn_implementation = "eager"
    clip = CLIPModel(config)
    load_strict(clip, floats(read_tensors(Path(folder) / "model.safetensors")), source=folder)
    return clip.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


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
