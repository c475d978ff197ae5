"""Models to disk in diffusers' folder layout, which condit and diffusers load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from condit.backbones.unet import UNet
from condit.diffusion.vp import Process
from condit.encoders.text import ClipText, FluxText, T5Text
from condit.weights.catalog import MODELS
from condit.weights.files import save_folder, save_tensors
from condit.weights.folders import WEIGHTS
from condit.weights.latent_models import LatentParts
from condit.weights.parts import Parts
from condit.weights.pixart import LIMITS
from condit.weights.stable_diffusion import SOLVERS


def save_model(parts: object, folder: str | Path) -> Path:
    """Writes Stable Diffusion, PixArt or FLUX.1 with its encoders, tokenizers and scheduler, whole or not at all.
    ValueError for other models, quantised weights, or a folder that is not empty."""
    if not isinstance(parts, Parts | LatentParts):
        raise ValueError(f"{type(parts).__name__} has no folder layout in diffusers; save its network's state_dict().")
    if parts.name in MODELS:
        raise ValueError(f"{parts.name!r} is part of condit and is loaded by its name; there is nothing to save.")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder; choose another one.")
    if any(p.dtype in (torch.float8_e4m3fn, torch.int8) for p in parts.backbone.parameters()):
        raise ValueError("Quantised weights cannot be saved. Load the model without quantize= and save that.")
    with save_folder(target) as made:
        index = {name: [library, kind] for name, (library, kind) in write_parts(parts, made).items()}
        write_json(made / "model_index.json", {"_class_name": pipeline_class(parts), **index, **options(parts)})
    return target


def pipeline_class(parts: Parts | LatentParts) -> str:
    """diffusers' pipeline for these parts."""
    if isinstance(parts, Parts):
        return "FluxPipeline"
    if not isinstance(parts.backbone, UNet):
        limit = cast("T5Text", parts.text).limit
        return next((name for name, known in LIMITS.items() if known == limit), next(iter(LIMITS)))
    config = parts.backbone.config
    name = "StableDiffusionXL" if config.addition_embed_type else "StableDiffusion"
    return f"{name}{'Inpaint' if config.in_channels > config.out_channels else ''}Pipeline"


def options(parts: Parts | LatentParts) -> dict[str, object]:
    """Fields of model_index.json besides the parts."""
    if isinstance(parts, LatentParts) and isinstance(parts.backbone, UNet):
        absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        if parts.backbone.config.addition_embed_type:
            del absent["safety_checker"]
            return {**absent, "force_zeros_for_empty_prompt": parts.zero_negative}
        return {**absent, "requires_safety_checker": False}
    return {}


def write_parts(parts: Parts | LatentParts, folder: Path) -> dict[str, tuple[str, str]]:
    """Writes every part into its folder -> its library and class by its name."""
    network = "unet" if isinstance(parts.backbone, UNet) else "transformer"
    kind = {"UNet": "UNet2DConditionModel", "PixArt": "PixArtTransformer2DModel"}.get(
        type(parts.backbone).__name__, "FluxTransformer2DModel"
    )
    write_network(parts.backbone, folder / network, kind)
    parts.vae.save_pretrained(folder / "vae")
    made = {network: ("diffusers", kind), "vae": ("diffusers", "AutoencoderKL")}
    for number, (tokenizer, encoder) in enumerate(towers(parts.text)):
        end = f"_{number + 1}" if number else ""
        tokenizer.save_pretrained(folder / f"tokenizer{end}")
        encoder.save_pretrained(folder / f"text_encoder{end}")
        made[f"tokenizer{end}"] = ("transformers", type(tokenizer).__name__)
        made[f"text_encoder{end}"] = ("transformers", type(encoder).__name__)
    scheduler = schedule(parts)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return {**made, "scheduler": ("diffusers", str(scheduler["_class_name"]))}


def towers(text: object) -> list[tuple[Any, Any]]:
    """(tokenizer, encoder) of each text encoder. ValueError for one of another library."""
    if isinstance(text, ClipText):
        return list(zip(text.tokenizers, text.encoders, strict=True))
    if isinstance(text, FluxText):
        return [(text.clip_tokenizer, text.clip), (text.t5_tokenizer, text.t5)]
    if isinstance(text, T5Text):
        return [(text.tokenizer, text.t5)]
    raise ValueError(f"{type(text).__name__} cannot be saved in diffusers' layout.")


def write_network(network: nn.Module, folder: Path, kind: str) -> None:
    config = asdict(cast("Any", network.config))
    save_tensors(folder / WEIGHTS, network.state_dict(), {"format": "pt"})
    write_json(folder / "config.json", {"_class_name": kind, **config})


def schedule(parts: Parts | LatentParts) -> dict[str, object]:
    """scheduler_config.json."""
    if isinstance(parts, Parts):
        (base_tokens, base), (most_tokens, most) = parts.dynamic.base, parts.dynamic.maximum
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "use_dynamic_shifting": parts.shift is None,
            "shift": 1.0 if parts.shift is None else parts.shift,
            "base_image_seq_len": base_tokens,
            "base_shift": base,
            "max_image_seq_len": most_tokens,
            "max_shift": most,
            "time_shift_type": parts.dynamic.kind,
            "stochastic_sampling": bool(parts.eta),
        }
    name = next((cls for cls, solver in SOLVERS.items() if solver == parts.solver), "DDIMScheduler")
    defaults = asdict(Process())
    fields = {key: value for key, value in asdict(parts.process).items() if value is not None or defaults[key]}
    return {"_class_name": name, **fields, **({"clip_sample": False} if name == "DDIMScheduler" else {})}


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
