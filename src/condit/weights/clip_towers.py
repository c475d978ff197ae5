"""CLIP's towers for image prompts, from folders: h94/IP-Adapter's `image_encoder/`, a whole CLIP, a text tower."""

from __future__ import annotations

from pathlib import Path

import torch

from condit.encoders.image import CLIPImage, TextTower
from condit.weights.files import Json, load_strict, read_tensors
from condit.weights.folders import floats, read_json
from condit.weights.hub_files import local_folder
from condit.weights.ip_projectors import vision_config
from condit.weights.stable_diffusion import load_tokenizer, make_clip_text
from condit.weights.vae import frozen

# Safetensors first: the same weights, without a pickle.
FILES = ("model.safetensors", "pytorch_model.bin")


def load_image_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> CLIPImage:
    """A CLIP image tower with its projection, strictly; of a whole CLIP only the image half. ValueError where files are
    missing or do not fit."""
    from accelerate import init_empty_weights
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = local_folder(folder)
    with init_empty_weights():
        model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(vision_config(folder)))
    tensors = floats(read_tensors(weight_file(folder)))
    # A whole CLIP holds the text half too, and old files the numbers of the positions.
    half = {n: t for n, t in tensors.items() if not n.startswith(("text_model.", "text_projection", "logit_scale"))}
    load_strict(model, {n: t for n, t in half.items() if not n.endswith("position_ids")}, source=folder, assign=True)
    return CLIPImage(frozen(model, dtype))


def load_text_tower(folder: str | Path) -> TextTower:
    """A CLIP text tower with its projection and its tokenizer, from a folder in transformers' layout."""
    folder = Path(local_folder(folder))
    config = read_json(folder / "config.json")
    inner: Json = {**config.get("text_config", config)}
    if "text_config" in config:
        inner["projection_dim"] = config["projection_dim"]
    tensors = read_tensors(weight_file(folder))
    half = {n: t for n, t in tensors.items() if n.startswith(("text_model.", "text_projection"))}
    model = make_clip_text(inner, half, folder, projected=True)
    return TextTower(model.eval().requires_grad_(False), load_tokenizer(folder))


def weight_file(folder: str | Path) -> Path:
    file = next((Path(folder) / name for name in FILES if (Path(folder) / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds neither {' nor '.join(FILES)}.")
    return file
