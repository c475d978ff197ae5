"""Stable Diffusion from disk: folders in diffusers' layout (1.x, 2.x, SDXL, their inpainting models)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.data.files import hash_file
from condit.diffusion.vp import Process, Solver
from condit.encoders.text import ClipText
from condit.weights.files import Json, load_strict
from condit.weights.folders import check_tokenizer, floats, read_folder, read_json, tuples, weight_files
from condit.weights.latent_models import LatentParts, tell_unet
from condit.weights.vae import chosen_autoencoder, frozen, load_autoencoder

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from condit.encoders.vae import Autoencoder

    ClipTower = CLIPTextModel | CLIPTextModelWithProjection

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


def load_stable_diffusion(
    folder: Path, dtype: torch.dtype, name: str, vae: Autoencoder | str | Path | None = None
) -> LatentParts:
    """The parts in a folder with model_index.json. ValueError where one is missing or is not Stable Diffusion's. vae:
    an autoencoder to use instead of the folder's, or its folder or file."""
    index = read_json(folder / "model_index.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    towers = [
        (
            load_tokenizer(folder / part.replace("text_encoder", "tokenizer")),
            load_clip_text(folder / part, projected=index[part][1].endswith("WithProjection")),
        )
        for part in ("text_encoder", "text_encoder_2")
        if (index.get(part) or [None])[0]
    ]
    return assemble(
        name,
        hash_file(weight_files(folder / "unet")[0]),
        load_unet(folder / "unet"),
        towers,
        load_autoencoder(folder / "vae")
        if vae is None
        else chosen_autoencoder(vae, read_json(folder / "vae" / "config.json")),
        Process.from_config(scheduler),
        SOLVERS.get(scheduler.get("_class_name", "")),
        dtype,
        zero_negative=index.get("force_zeros_for_empty_prompt"),
    )


def assemble(
    name: str,
    hash: str,
    unet: UNet,
    towers: Sequence[tuple[CLIPTokenizer, ClipTower]],
    vae: AutoencoderKL,
    process: Process,
    solver: Solver | None,
    dtype: torch.dtype,
    *,
    zero_negative: bool | None = None,
) -> LatentParts:
    """A pipeline's parts, frozen and in `dtype`; an autoencoder that overflows in float16 stays in float32. towers: a
    tokenizer and an encoder each. zero_negative None: as SDXL and Stable Diffusion do. ValueError if the parts do not
    fit together."""
    c, channels = unet.config, vae.config["latent_channels"]
    if c.in_channels not in (channels, 2 * channels + 1):
        raise ValueError(
            f"{name}: a UNet of {c.in_channels} channels on latents of {channels}. Supported are {channels} and, for "
            f"inpainting, {2 * channels + 1}."
        )
    if vae.config.get("latents_mean") is not None:
        raise ValueError(f"{name}: an autoencoder with latents_mean (Playground 2.5), which is not Stable Diffusion's.")
    sizes = (c.projection_class_embeddings_input_dim or 0) - 6 * (c.addition_time_embed_dim or 0)
    if c.addition_embed_type is not None and sizes != towers[-1][1].config.projection_dim:
        raise ValueError(
            f"{name}: a UNet that is told {c.projection_class_embeddings_input_dim} numbers of text and sizes. SDXL's "
            "refiner, which is told an aesthetic score, is not supported; use diffusers' pipeline for it, after condit."
        )
    if c.time_cond_proj_dim is not None:
        raise ValueError(
            f"{name}: a UNet that is told the guidance scale (LCM). Use diffusers' pipeline with condit.interop.attach."
        )
    width = sum(encoder.config.hidden_size for _, encoder in towers)
    if width != c.cross_attention_dim:
        raise ValueError(f"{name}: text of width {width} for a UNet that reads {c.cross_attention_dim}. Another model?")
    sdxl = c.addition_embed_type is not None
    tokenizers, encoders = zip(*towers, strict=True)
    text = ClipText(tokenizers, encoders, penultimate=sdxl)
    upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    for module, kind in ((unet, dtype), (text, dtype), (vae, torch.float32 if upcast else dtype)):
        frozen(module, kind)
    side = c.sample_size * 2 ** (len(vae.config["block_out_channels"]) - 1)
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
        zero_negative=sdxl if zero_negative is None else bool(zero_negative),
    )


def load_unet(folder: Path) -> UNet:
    """The network, strictly; ValueError for a UNet that is not Stable Diffusion's."""
    config = unet_config(read_json(folder / "config.json"), folder)
    with torch.device("meta"):
        unet = UNet(config)
    load_strict(unet, read_folder(folder), source=folder, assign=True)
    return unet


def unet_config(raw: Json, source: str | Path) -> UNetConfig:
    """The configuration in a config.json of diffusers, with diffusers' defaults. ValueError for a setting that this
    network does not support."""
    ours = {field.name for field in fields(UNetConfig)}
    others = {name for name in raw if not name.startswith("_")} - ours - set(_IDLE)
    # A complete configuration, such as the embedded model's, needs no defaults, and diffusers takes seconds to import.
    defaults = _defaults() if others or not ours <= raw.keys() else {}
    # The middle block's own switch: published files repeat the default of only_cross_attention.
    defaults["mid_block_only_cross_attention"] = raw.get("mid_block_only_cross_attention") or None
    for name, value in raw.items():
        idle = name.startswith("_") or name in ours or name in _IDLE or value == defaults.get(name)
        if not idle and name != "mid_block_only_cross_attention":
            raise ValueError(f"{source}: the UNet has {name} = {value!r}, which Stable Diffusion's does not have.")
    config = {name: raw[name] if name in raw else defaults[name] for name in ours}
    config["sample_size"] = config["sample_size"] or 64
    widths = config["cross_attention_dim"]
    if not isinstance(widths, int):
        if len(set(widths)) > 1:
            raise ValueError(f"{source}: cross_attention_dim = {widths!r}; the levels of the UNet read one width here.")
        config["cross_attention_dim"] = widths[0]
    return UNetConfig(**tuples(config))


def _defaults() -> Json:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: p.default for name, p in signature.items() if name != "self"}


def load_clip_text(folder: Path, *, projected: bool) -> ClipTower:
    """A text tower, strictly; `projected`: with the projection of its pooled vector."""
    return make_clip_text(read_json(folder / "config.json"), read_folder(folder), folder, projected=projected)


def make_clip_text(config: Json, tensors: Mapping[str, Tensor], source: str | Path, *, projected: bool) -> ClipTower:
    """transformers' text tower from its published tensors, strictly."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # Not from_pretrained: it draws a progress bar, and fills missing tensors with random numbers.
    made = CLIPTextConfig.from_dict(dict(config))
    with init_empty_weights():  # sizes of a configuration are not allocated before they have been compared with a file
        model = CLIPTextModelWithProjection(made) if projected else CLIPTextModel(made)
    flat = not hasattr(model, "text_model")  # since transformers 5
    plain = {n.removeprefix("text_model.") if flat else n: t for n, t in tensors.items() if "position_ids" not in n}
    load_strict(model, floats(plain), source=source, assign=True)
    return model


def load_tokenizer(folder: Path, *, pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer. FileNotFoundError without its files, of which transformers would make an empty one."""
    from transformers import CLIPTokenizer

    check_tokenizer(folder, "vocab.json", "merges.txt")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer
