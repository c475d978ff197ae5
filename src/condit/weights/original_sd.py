"""Stable Diffusion in one file, as its authors and most of its users keep it: `model.diffusion_model.*` (UNet),
`first_stage_model.*` (autoencoder), `cond_stage_model.*` or `conditioner.embedders.*` (text). A table of rules brings
the names to those of diffusers and transformers.

Such a file has no tokenizer and no configuration: the sizes are told by the tensors, the tokenizer is looked for beside
the file, in the models folder and in Hugging Face's cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condit.backbones.unet import CROSS_DOWN, CROSS_UP, PRESETS, UNet, UNetConfig
from condit.diffusion.vp import Process
from condit.encoders.text import ClipText
from condit.weights.class_models import models_folder
from condit.weights.deadiff import IMAGE_MAP
from condit.weights.files import hash_file, inner_state, load_strict, read_tensors
from condit.weights.latent_models import LatentParts
from condit.weights.stable_diffusion import assemble, load_tokenizer, make_autoencoder, make_clip_text

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L = {  # openai/clip-vit-large-patch14, text_config
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, text_config
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


@dataclass(frozen=True)
class Tower:
    """A text tower in such a file: its prefix, its configuration, and whether its names are OpenCLIP's."""

    prefix: str
    config: Mapping[str, Any]
    open_clip: bool = False


@dataclass(frozen=True)
class Original:
    """What such a file holds, and what it leaves unsaid."""

    unet: UNetConfig
    vae: Mapping[str, Any]
    towers: tuple[Tower, ...]
    process: Process


_SD1 = Process()
ORIGINALS: dict[str, Original] = {
    "sd15": Original(PRESETS["sd15"], AUTOENCODER, (Tower("cond_stage_model.transformer.", CLIP_L),), _SD1),
    "sdxl": Original(
        PRESETS["sdxl"],
        {**AUTOENCODER, "scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024},
        (
            Tower("conditioner.embedders.0.transformer.", CLIP_L),
            Tower("conditioner.embedders.1.model.", CLIP_G, open_clip=True),
        ),
        replace(_SD1, timestep_spacing="leading"),
    ),
}

# Rules: the beginning of an original name, or a pattern in it -> what stands there instead.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_RULES = (
    (r"^(encoder|decoder)\.mid\.block_(\d)\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", lambda m: f"{m[1]}.mid_block.attentions.0."),
    (r"^encoder\.down\.(\d)\.block\.", lambda m: f"encoder.down_blocks.{m[1]}.resnets."),
    (r"^encoder\.down\.(\d)\.downsample\.", lambda m: f"encoder.down_blocks.{m[1]}.downsamplers.0."),
    (r"\.norm_out\.", lambda m: ".conv_norm_out."),
    (r"\.nin_shortcut\.", lambda m: ".conv_shortcut."),
    (r"\.attentions\.0\.norm\.", lambda m: ".attentions.0.group_norm."),
    (r"\.attentions\.0\.([qkv])\.", lambda m: f".attentions.0.to_{m[1]}."),
    (r"\.attentions\.0\.proj_out\.", lambda m: ".attentions.0.to_out.0."),
)
_OPEN_CLIP_RULES = (
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def load_original(
    file: Path, dtype: torch.dtype, name: str, originals: Mapping[str, Original] = ORIGINALS, tokenizer: Any = None
) -> LatentParts:
    """The parts in such a file. ValueError where it holds no Stable Diffusion that is known here."""
    tensors = inner_state(read_tensors(file))
    # DEADiff's file is a Stable Diffusion with image maps inside its UNet; those are its adapter's.
    tensors = {name: tensor for name, tensor in tensors.items() if not IMAGE_MAP.fullmatch(name)}
    original = told(tensors, originals, file)
    with torch.device("meta"):
        unet = UNet(original.unet)
    load_strict(unet, unet_names(part(tensors, UNET), original.unet), source=file, assign=True)
    vae = make_autoencoder(original.vae, vae_names(part(tensors, VAE), len(original.vae["block_out_channels"])), file)
    sdxl = original.unet.addition_embed_type is not None
    encoders = [
        make_clip_text(
            tower.config,
            open_clip_names(part(tensors, tower.prefix)) if tower.open_clip else part(tensors, tower.prefix),
            file,
            projected=tower.open_clip,
        )
        for tower in original.towers
    ]
    tokenizers = [find_tokenizer(file, n) if tokenizer is None else tokenizer for n in range(len(encoders))]
    return assemble(
        name,
        hash_file(file),
        unet,
        ClipText(tokenizers, encoders, penultimate=sdxl),
        vae,
        original.process,
        "euler" if sdxl else "ddim",
        dtype,
        zero_negative=sdxl,
    )


def told(tensors: Mapping[str, Tensor], originals: Mapping[str, Original], source: Path) -> Original:
    """The model of which a file's tensors are, by the width of its text; with the channels that its UNet reads."""
    place = next((n for n in tensors if n.startswith(UNET) and n.endswith("attn2.to_k.weight")), None)
    width = None if place is None else tensors[place].shape[1]
    for original in originals.values():
        here = all(any(n.startswith(tower.prefix) for n in tensors) for tower in original.towers)
        if width == original.unet.cross_attention_dim and here:
            channels = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]
            return replace(original, unet=replace(original.unet, in_channels=channels))
    known = ", ".join(f"{name} reads text of width {o.unet.cross_attention_dim}" for name, o in originals.items())
    raise ValueError(
        f"{source}: a UNet that reads text of width {width}. Known in one file are: {known}. Others load from a folder "
        "in diffusers' layout."
    )


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors behind a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_names(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A UNet's tensors under diffusers' names."""
    return {unet_name(name, config): tensor for name, tensor in tensors.items()}


def unet_name(name: str, c: UNetConfig) -> str:
    """diffusers' name of a tensor of the original UNet; a name that is not known stays as it is."""
    for old, new in _ENDS.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    found = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.*)", name)
    if found is None:
        return name
    if found[1] == "middle_block":
        if found[2] == "1":
            return f"mid_block.attentions.0.{found[4]}"
        return f"mid_block.resnets.{int(found[2]) // 2}.{resnet_name(found[4])}"
    inner, rest = int(found[3]), found[4]
    if found[1] == "input_blocks":
        level, layer = divmod(int(found[2]) - 1, c.layers_per_block + 1)
        if layer == c.layers_per_block:
            return f"down_blocks.{level}.downsamplers.0.{rest.replace('op.', 'conv.')}"
        block, attends = f"down_blocks.{level}", c.down_block_types[level] == CROSS_DOWN
    else:
        level, layer = divmod(int(found[2]), c.layers_per_block + 1)
        block, attends = f"up_blocks.{level}", c.up_block_types[level] == CROSS_UP
    if inner == 0:
        return f"{block}.resnets.{layer}.{resnet_name(rest)}"
    if inner == 1 and attends:
        return f"{block}.attentions.{layer}.{rest}"
    return f"{block}.upsamplers.0.{rest}"


def resnet_name(name: str) -> str:
    for old, new in _RESNET.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def vae_names(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """An autoencoder's tensors under diffusers' names, which count the decoder's levels from the coarsest."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, rule in _VAE_RULES:
            name = re.sub(pattern, rule, name)
        up = re.match(r"decoder\.up\.(\d)\.(block|upsample)\.(.*)", name)
        if up:
            inner = "resnets" if up[2] == "block" else "upsamplers.0"
            name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{inner}.{up[3]}"
        # Left from training: the loss, and a moving average of the weights.
        if not name.startswith(("loss.", "model_ema.")):
            found[name] = tensor
    return found


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of OpenCLIP under transformers' names: queries, keys and values in one matrix come apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "logit_scale":
            continue
        if name == "text_projection":
            found["text_projection.weight"] = tensor.mT.contiguous()
            continue
        for pattern, new in _OPEN_CLIP_RULES:
            name = re.sub(pattern, new, name)
        joined = re.match(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if joined:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"text_model.{joined[1]}.self_attn.{letter}_proj.{joined[2]}"] = piece.clone()
        else:
            found[f"text_model.{name}"] = tensor
    return found


def find_tokenizer(file: Path, tower: int) -> Any:
    """CLIP's tokenizer for a tower (0, 1), from the first place that has it; the second one pads with zeros."""
    homes = (file.parent, models_folder())
    if tower == 1:
        for home in homes:
            if (home / "tokenizer_2").is_dir():
                return load_tokenizer(home / "tokenizer_2")
    padding = None if tower == 0 else "!"
    for home in homes:
        if (home / "tokenizer").is_dir():
            return load_tokenizer(home / "tokenizer", pad_token=padding)
    cached = cached_clip()
    if cached is not None:
        return load_tokenizer(cached, pad_token=padding)
    raise FileNotFoundError(
        f"{file.name} has no tokenizer inside: put CLIP's (vocab.json and merges.txt, as in "
        f"huggingface.co/openai/clip-vit-large-patch14) into {homes[0] / 'tokenizer'} or {homes[1] / 'tokenizer'}."
    )


def cached_clip() -> Path | None:
    """The folder of openai/clip-vit-large-patch14 in Hugging Face's cache, if its tokenizer was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache("openai/clip-vit-large-patch14", name) for name in ("vocab.json", "merges.txt")]
    return Path(found[0]).parent if all(isinstance(f, str) for f in found) else None  # type: ignore[arg-type]
