"""Names and folders to the parts of a pipeline: the one place that knows every backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.encoders.image import TinyImage
from condit.encoders.text import FluxText, TinyText
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.class_models import PUBLISHED, looks_like
from condit.weights.files import load_strict, read_tensors
from condit.weights.latent_models import PUBLISHED as LATENT
from condit.weights.latent_models import LatentModel, LatentParts
from condit.weights.original_sd import load_original
from condit.weights.stable_diffusion import load_stable_diffusion
from condit.weights.tiny import WEIGHTS, floats, load_clip, load_latent, read_config


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of. `shift` of the schedule: a number, or None for FLUX.1-dev's dynamic one."""

    name: str
    hash: str
    backbone: MMDiT
    text: Callable
    vae: Any
    image: Any
    prediction: str
    shift: float | None
    size: tuple[int, int]
    steps: int
    guidance: float
    distilled: bool  # guidance is an input of the model (FLUX.1-dev) or absent (schnell), not two predictions


def load_parts(source: str | Path, *, dtype: torch.dtype | None = None) -> Parts:
    """An embedded model by name, or a folder in diffusers' FLUX layout."""
    name = str(source)
    if name in MODELS and MODELS[name].kind == "model":
        return load_tiny(name, MODELS[name].path, dtype or torch.float32)
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return load_flux(folder, dtype or torch.bfloat16)
    known = ", ".join([*(n for n, e in MODELS.items() if e.kind == "model"), *LATENT, *PUBLISHED])
    raise ValueError(
        f"No model {name!r}.{looks_like(folder)} Known: {known}; or give a folder with model_index.json (diffusers' "
        "FLUX or Stable Diffusion layout), or a file or folder of Stable Diffusion, DiT, DiffiT or ViT. "
        "For FLUX.1 weights download the repository first and pass its folder."
    )


def load_latent_parts(model: LatentModel, *, dtype: torch.dtype) -> LatentParts:
    """A text-to-image model over latents that `latent_models.recognise` has found."""
    if model.kind == "stable-diffusion-file":
        return load_original(model.path, dtype, model.name)
    return load_stable_diffusion(model.path, dtype, model.name)


def load_tiny(name: str, folder: Path, dtype: torch.dtype) -> Parts:
    """The embedded text-to-icon model."""
    clip, tokenizer = load_clip(folder / "clip")
    text = TinyText(clip, tokenizer)
    load_strict(text.canvas, floats(read_tensors(folder / "canvas" / WEIGHTS)), source=folder / "canvas")
    raw = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    backbone = load_mmdit(folder / "transformer", floats)
    return Parts(
        name=name,
        hash=describe_hash(folder),
        backbone=backbone.to(dtype),
        text=text.eval(),
        vae=load_latent(folder / "vae"),
        image=TinyImage(clip).eval(),
        prediction=raw["condit"]["prediction"],
        shift=raw["condit"]["shift"],
        size=(128, 128),
        steps=20,
        guidance=3.0,
        distilled=False,
    )


def load_mmdit(folder: Path, convert: Callable = dict) -> MMDiT:
    """An MM-DiT from diffusers' layout: config.json and one or several safetensors files, strictly."""
    fields: dict[str, Any] = read_config(folder)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    unknown = sorted(fields.keys() - MMDiTConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{folder}/config.json has {unknown[0]!r}, which FLUX's transformer does not. Another model?")
    with torch.device("meta"):
        backbone = MMDiT(MMDiTConfig(**fields))
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file)
    load_strict(backbone, convert(tensors), source=folder, assign=True)
    return backbone.eval().requires_grad_(False)


def load_flux(folder: Path, dtype: torch.dtype) -> Parts:
    """A FLUX.1 folder as diffusers saves it."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if "Flux" not in str(index.get("_class_name")):
        raise ValueError(f"{folder} is a {index.get('_class_name')}; this loader reads FLUX.1 folders.")
    text = FluxText(
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype),
        AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    dynamic = scheduler.config.use_dynamic_shifting
    backbone = load_mmdit(folder / "transformer").to(dtype)
    pixels = 2 ** (len(vae.config.block_out_channels) - 1) * 2
    side = 1024 if backbone.config.num_layers >= PRESETS["flux-dev"].num_layers else 8 * pixels
    modules: list[nn.Module] = [text, vae]
    for module in modules:
        module.eval().requires_grad_(False)
    return Parts(
        name=folder.name,
        hash=describe_hash(folder),
        backbone=backbone,
        text=text,
        vae=vae,
        image=None,
        prediction="velocity",
        shift=None if dynamic else float(scheduler.config.shift),
        size=(side, side),
        steps=28 if dynamic else 4,
        guidance=3.5,
        distilled=True,
    )
