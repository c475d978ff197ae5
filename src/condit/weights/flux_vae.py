"""FLUX.1's autoencoder: as diffusers saves it, or in its authors' names (ae.safetensors) by a table of rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.weights.files import load_strict, read_tensors
from condit.weights.tiny import read_config

PREFIXES = ("first_stage_model.", "vae.")  # before the names in files of whole pipelines
# The authors' names -> diffusers', in order. `up` counts from the finest level there, from the coarsest in diffusers.
RULES = (
    (r"(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
)
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "norm_num_groups": 32, "use_quant_conv": False}
FLUX |= {"use_post_quant_conv": False}


def load_autoencoder(place: Path | None, dtype: torch.dtype, inside: Mapping[str, Tensor] | None = None) -> Any:
    """AutoencoderKL from a folder of diffusers or a file in the authors' names, frozen. `inside`: tensors in these
    names, for which the folder only gives the configuration, if there is one."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    assert place is not None
    if inside is None and place.is_dir():
        vae = AutoencoderKL.from_pretrained(place, torch_dtype=dtype, local_files_only=True)
        return vae.eval().requires_grad_(False)
    tensors = autoencoder_tensors(read_tensors(place)) if inside is None else dict(inside)
    folder = place if place.is_dir() else place.parent / "vae"
    given = read_config(folder) if (folder / "config.json").is_file() else FLUX
    if not tensors:
        raise ValueError(f"{place} holds no autoencoder in FLUX.1's names (encoder.conv_in, decoder.up.0 ...).")
    with torch.device("meta"):
        vae = AutoencoderKL(**{**given, **infer_sizes(tensors, place)})
    cast = {name: t.to(dtype) for name, t in to_diffusers(tensors).items()}
    load_strict(vae, cast, source=place, assign=True)
    return vae.eval().requires_grad_(False)


def autoencoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an autoencoder in the authors' names, without a prefix; {} if there is none."""
    prefix = next((p for p in (*PREFIXES, "") if f"{p}encoder.down.0.block.0.conv1.weight" in tensors), None)
    if prefix is None:
        return {}
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in own.items() if name.startswith(("encoder.", "decoder.", "quant_", "post_quant_"))}


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the authors' names -> in diffusers'."""
    levels = levels_of(tensors)
    found = {}
    for name, tensor in tensors.items():
        for old, new in RULES:
            name = re.sub(old, new, name)
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
        # Attention is a convolution of 1 x 1 there, a linear layer here.
        found[name] = tensor[:, :, 0, 0] if ".attentions.0.to_" in name and tensor.ndim == 4 else tensor
    return found


def levels_of(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down."))


def infer_sizes(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """What the shapes say of diffusers' configuration."""
    levels = levels_of(tensors)
    try:
        widths = tuple(len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels))
        latent = len(tensors["encoder.conv_out.weight"]) // 2
    except KeyError as error:
        raise ValueError(f"{source} is no whole autoencoder of FLUX.1: {error} is missing.") from None
    blocks = {int(n.split(".")[4]) for n in tensors if n.startswith("encoder.down.0.block.")}
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": len(blocks),
        "latent_channels": latent,
    }
