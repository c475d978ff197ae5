"""Small files as IP-Adapter publishes them, with an image encoder beside."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.drawing.pipeline import Pipeline


def vision(folder: Path, *, hidden: int = 20, projection: int = 12) -> Path:
    """A folder as h94/IP-Adapter's image_encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "projection_dim": projection,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **config}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def published(pipe: Pipeline, features: int = 12, tokens: int = 4) -> dict[str, Tensor]:
    """A global adapter's file for the pipeline's UNet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = IPAdapter.new(pipe, IPConfig(features, tokens, pipe.backbone.config.cross_attention_dim))
    return {n: t.clone().contiguous() for n, t in adapter.tensors().items()}


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As a `.bin` has it."""
    values: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        values[part][rest] = tensor
    return values


def resampler(features: int, out: int, dim: int = 768, heads: int = 12) -> dict[str, Tensor]:
    from condit.controls.ip_projectors import Resampler

    with torch.device("meta"):
        sizes = {"inner": 64 * heads, "heads": heads, "depth": 4, "hidden": 4 * dim, "queries": 16}
        return Resampler(features, dim, out, **sizes).state_dict()


def write_file(pipe: Pipeline, folder: Path) -> Path:
    """A published file for the pipeline with its encoder beside it."""
    vision(folder / "image_encoder")
    path = folder / "ip-adapter.safetensors"
    save_file(published(pipe), path)
    return path
