"""Stable Diffusion from disk: folders in diffusers' layout (1.x, 2.x, SDXL, their inpainting models)."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condit.backbones.unet import UNet, UNetConfig
from condit.diffusion.vp import Process, Solver
from condit.encoders.text import ClipText
from condit.weights.files import hash_file, load_strict, read_tensors
from condit.weights.latent_models import LatentParts, tell_unet

# PNDM's steps are DDIM's of higher order, at the same timesteps.
SOLVERS: dict[str, Solver] = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
}
# Fields of a UNet's config.json that change nothing here.
_IDLE = ("upcast_attention", "addition_embed_type_num_heads", "dropout", "sample_size")
_PLAIN = re.compile(r"[^.]+(-\d+-of-\d+)?\.(safetensors|bin)")


def load_stable_diffusion(folder: Path, dtype: torch.dtype, name: str | None = None) -> LatentParts:
    """A folder with model_index.json. ValueError where a part is missing or is not Stable Diffusion's."""
    index = read_json(folder / "model_index.json")
    unet = load_unet(folder / "unet")
    towers = [part for part in ("text_encoder", "text_encoder_2") if (index.get(part) or [None])[0]]
    text = ClipText(
        [load_tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in towers],
        [load_clip_text(folder / part, projected=index[part][1].endswith("WithProjection")) for part in towers],
        penultimate=unet.config.addition_embed_type is not None,
    )
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return assemble(
        name or folder.name,
        hash_file(weight_files(folder / "unet")[0]),
        unet,
        text,
        load_autoencoder(folder / "vae"),
        Process.from_config(scheduler),
        SOLVERS.get(scheduler.get("_class_name", "")),
        dtype,
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", unet.config.addition_embed_type is not None)),
    )


def assemble(
    name: str,
    hash: str,
    unet: UNet,
    text: ClipText,
    vae: Any,
    process: Process,
    solver: Solver | None,
    dtype: torch.dtype,
    *,
    zero_negative: bool,
) -> LatentParts:
    """The parts of a model that draws, frozen and in `dtype`; an autoencoder that overflows in float16 stays in
    float32. ValueError if they do not fit together."""
    c, channels = unet.config, vae.config.latent_channels
    if c.in_channels not in (channels, 2 * channels + 1):
        raise ValueError(
            f"{name}: a UNet of {c.in_channels} channels on latents of {channels}. Known are {channels} and, for "
            f"inpainting, {2 * channels + 1}."
        )
    found = sum(encoder.config.hidden_size for encoder in text.encoders)  # type: ignore[union-attr,misc]
    if found != c.cross_attention_dim:
        raise ValueError(f"{name}: text of width {found} for a UNet that reads {c.cross_attention_dim}. Another model?")
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    for module, kind in ((unet, dtype), (text, dtype), (vae, torch.float32 if upcast else dtype)):
        nn.Module.to(module, kind).eval().requires_grad_(False)  # diffusers' own `to` warns about nothing
    side = c.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    sdxl = c.addition_embed_type is not None
    return LatentParts(
        name=name,
        hash=hash,
        backbone=unet,
        text=text,
        vae=vae,
        image=None,
        process=process,
        solver=solver,
        size=(side, side),
        steps=50,
        guidance=5.0 if sdxl else 7.5,  # diffusers' defaults
        tell=tell_unet,
        zero_negative=zero_negative,
    )


def load_unet(folder: Path) -> UNet:
    """The network, strictly; ValueError for a UNet that is not Stable Diffusion's."""
    config = unet_config(read_json(folder / "config.json"), folder)
    with torch.device("meta"):
        unet = UNet(config)
    load_strict(unet, read_folder(folder), source=folder, assign=True)
    return unet


def unet_config(raw: Mapping[str, Any], source: str | Path) -> UNetConfig:
    """From a config.json of diffusers; what it leaves out is diffusers' default."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults: dict[str, Any] = {name: p.default for name, p in signature.items() if name != "self"}
    ours = {field.name for field in fields(UNetConfig)}
    # The middle block's own switch: published files repeat the default of only_cross_attention.
    defaults["mid_block_only_cross_attention"] = raw.get("mid_block_only_cross_attention") or None
    for name, value in raw.items():
        idle = name.startswith("_") or name in ours or name in _IDLE or value == defaults.get(name)
        if not idle and name != "mid_block_only_cross_attention":
            raise ValueError(f"{source}: the UNet has {name} = {value!r}, which Stable Diffusion's has not.")
    given: dict[str, Any] = {
        **{name: defaults[name] for name in ours},
        **{name: raw[name] for name in ours if name in raw},
    }
    given["sample_size"] = given["sample_size"] or 64
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return UNetConfig(**given)


def load_clip_text(folder: Path, *, projected: bool) -> nn.Module:
    """A text tower, strictly; `projected` with the projection behind its pooled vector."""
    return make_clip_text(read_json(folder / "config.json"), read_folder(folder), folder, projected=projected)


def make_clip_text(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | Path, *, projected: bool
) -> nn.Module:
    """transformers' text tower from its published tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # Not from_pretrained: it draws a progress bar, and fills what is missing with chance.
    made = CLIPTextConfig.from_dict(dict(config))
    model = CLIPTextModelWithProjection(made) if projected else CLIPTextModel(made)
    flat = not hasattr(model, "text_model")  # since transformers 5
    plain = {n.removeprefix("text_model.") if flat else n: t for n, t in tensors.items() if "position_ids" not in n}
    load_strict(model, plain, source=source)
    return model


def load_tokenizer(folder: Path, *, pad_token: str | None = None) -> Any:
    """CLIP's tokenizer; FileNotFoundError without its files, as transformers would make an empty one."""
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise FileNotFoundError(f"no tokenizer at {folder}: vocab.json and merges.txt are expected there")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def load_autoencoder(folder: Path) -> Any:
    """diffusers' AutoencoderKL, strictly."""
    return make_autoencoder(read_json(folder / "config.json"), read_folder(folder), folder)


# Old files call the attention of the middle block so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def make_autoencoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | Path) -> Any:
    """diffusers' AutoencoderKL from its published tensors."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(dict(config))
    renamed = {}
    for name, tensor in tensors.items():
        old = re.match(r"(.*\.attentions\.\d\.)(query|key|value|proj_attn)\.(.*)", name)
        found = f"{old[1]}{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else name
        linear = ".attentions." in found and tensor.ndim == 4  # a 1 x 1 convolution where a linear stands today
        renamed[found] = tensor[:, :, 0, 0] if linear else tensor
    load_strict(vae, renamed, source=source, assign=True)
    return vae


# Files of a folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a part."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weights of a part, one file or several: safetensors before .bin, full precision before a variant (fp16)."""
    for ending in ("*.safetensors", "*.bin"):
        files = sorted(folder.glob(ending))
        plain = [file for file in files if _PLAIN.fullmatch(file.name)]
        variants = {file.name.split(".")[1] for file in files if file not in plain}
        if len(variants) > 1 and not plain:
            raise ValueError(
                f"{folder} holds several variants: {', '.join(sorted(variants))}. Leave one of them there."
            )
        if files:
            return plain or files
    raise FileNotFoundError(f"no weights in {folder}: a safetensors file is expected there")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} at {path.parent}: is it a folder in diffusers' layout?") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
