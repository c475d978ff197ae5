"""Stable Diffusion in one file, as its authors and most of its users keep it: `model.diffusion_model.*` (UNet),
`first_stage_model.*` (autoencoder), `cond_stage_model.*` or `conditioner.embedders.*` (text). A table of rules brings
the names to those of diffusers and transformers.

Such a file has no tokenizer and no configuration. The shapes of its tensors give the sizes; the tokenizer is taken from
the file's folder, the models folder or Hugging Face's cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from condit.backbones.unet import CROSS_DOWN, CROSS_UP, PRESETS, UNet, UNetConfig
from condit.data.files import hash_file
from condit.diffusion.vp import Process
from condit.weights.catalog import models_folder
from condit.weights.deadiff import IMAGE_MAP
from condit.weights.files import Json, inner_state, load_strict, read_tensors
from condit.weights.latent_models import LatentParts
from condit.weights.stable_diffusion import assemble, load_tokenizer, make_clip_text
from condit.weights.vae import chosen_autoencoder, make_autoencoder, vae_names

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from condit.encoders.vae import Autoencoder

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def _clip(width: int, layers: int, act: str) -> Json:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "projection_dim": width,
        "hidden_act": act,
    }


CLIP_L = _clip(768, 12, "quick_gelu")  # openai/clip-vit-large-patch14, text_config
CLIP_G = _clip(1280, 32, "gelu")  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, text_config
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
    config: Json
    open_clip: bool = False


@dataclass(frozen=True)
class Original:
    """The configuration of a model in such a file."""

    unet: UNetConfig
    vae: Json
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

EDM = {"edm_vpred.sigma_max": "a CosXL", "edm_mean": "a Playground 2.5"}
# Rules: the beginning of an original name, or a pattern in it -> its replacement.
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
    file: Path,
    dtype: torch.dtype,
    name: str,
    originals: Mapping[str, Original] = ORIGINALS,
    tokenizer: CLIPTokenizer | None = None,
    vae: Autoencoder | str | Path | None = None,
) -> LatentParts:
    """The parts in such a file. ValueError unless it holds one of `originals`, whole. tokenizer None: see
    `find_tokenizer`. vae: an autoencoder to use instead of the file's, or its folder or file."""
    tensors = inner_state(read_tensors(file))
    # DEADiff's file is a Stable Diffusion with image maps inside its UNet; those are its adapter's.
    tensors = {name: tensor for name, tensor in tensors.items() if not IMAGE_MAP.fullmatch(name)}
    original = recognise(tensors, originals, file)
    with torch.device("meta"):
        unet = UNet(original.unet)
    load_strict(unet, unet_names(part(tensors, UNET), original.unet), source=file, assign=True)
    if vae is None:
        autoencoder = make_autoencoder(original.vae, vae_names(part(tensors, VAE)), file)
    else:
        autoencoder = chosen_autoencoder(vae, original.vae)
    towers = []
    for n, tower in enumerate(original.towers):
        own = part(tensors, tower.prefix)
        own = open_clip_names(own) if tower.open_clip else own
        encoder = make_clip_text(tower.config, own, file, projected=tower.open_clip)
        towers.append((tokenizer or find_tokenizer(file, n), encoder))
    solver = "ddim" if original.unet.addition_embed_type is None else "euler"
    return assemble(name, hash_file(file), unet, towers, autoencoder, original.process, solver, dtype)


def recognise(tensors: Mapping[str, Tensor], originals: Mapping[str, Original], source: Path) -> Original:
    """The model with these tensors, by the width of its text; with as many input channels as the file's UNet."""
    place = next((n for n in tensors if n.startswith(UNET) and n.endswith("attn2.to_k.weight")), None)
    width = None if place is None else tensors[place].shape[1]
    for original in originals.values():
        has_text = all(any(n.startswith(tower.prefix) for n in tensors) for tower in original.towers)
        if width == original.unet.cross_attention_dim and has_text:
            channels = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]
            process = marked(original.process, tensors, source)
            return replace(original, unet=replace(original.unet, in_channels=channels), process=process)
    known = ", ".join(f"{name} reads text of width {o.unet.cross_attention_dim}" for name, o in originals.items())
    raise ValueError(
        f"{source}: a UNet that reads text of width {width}. Supported in one file are: {known}. Others load from a "
        "folder in diffusers' layout."
    )


def marked(process: Process, tensors: Mapping[str, Tensor], source: Path) -> Process:
    """The process that the empty tensors of a file name, which its trainer adds: `v_pred` and `ztsnr` (NoobAI). With
    zero terminal SNR a run begins at the last timestep (Lin et al. 2023, arXiv:2305.08891, section 3.3). ValueError for
    a process that condit does not run."""
    for name, model in EDM.items():
        if name in tensors:
            raise ValueError(
                f"{source}: {name!r} marks {model}, whose noise levels are EDM's (arXiv:2206.00364). condit runs "
                "Stable Diffusion's only; use diffusers' pipeline with its EDM schedulers, and condit.interop.attach."
            )
    if "v_pred" in tensors:
        process = replace(process, prediction_type="v_prediction")
    if "ztsnr" in tensors:
        process = replace(process, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return process


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_names(tensors: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A UNet's tensors under diffusers' names."""
    return {unet_name(name, config): tensor for name, tensor in tensors.items()}


def unet_name(name: str, c: UNetConfig) -> str:
    """diffusers' name of a tensor of the original UNet; an unknown name stays as it is."""
    for old, new in _ENDS.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.*)", name)
    if match is None:
        return name
    side, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest}" if number == 1 else f"mid_block.resnets.{number // 2}.{_resnet(rest)}"
    level, layer = divmod(number - (side == "input_blocks"), c.layers_per_block + 1)
    if side == "input_blocks":
        if layer == c.layers_per_block:
            return f"down_blocks.{level}.downsamplers.0.{rest.replace('op.', 'conv.')}"
        block, attends = f"down_blocks.{level}", c.down_block_types[level] == CROSS_DOWN
    else:
        block, attends = f"up_blocks.{level}", c.up_block_types[level] == CROSS_UP
    if inner == "0":
        return f"{block}.resnets.{layer}.{_resnet(rest)}"
    if inner == "1" and attends:
        return f"{block}.attentions.{layer}.{rest}"
    return f"{block}.upsamplers.0.{rest}"


def _resnet(name: str) -> str:
    for old, new in _RESNET.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of OpenCLIP under transformers' names; its matrix of queries, keys and values is split."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "logit_scale":
            continue
        if name == "text_projection":
            renamed["text_projection.weight"] = tensor.mT.contiguous()
            continue
        for pattern, new in _OPEN_CLIP_RULES:
            name = re.sub(pattern, new, name)
        joined = re.match(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if joined:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"text_model.{joined[1]}.self_attn.{letter}_proj.{joined[2]}"] = piece.clone()
        else:
            renamed[f"text_model.{name}"] = tensor
    return renamed


def find_tokenizer(file: Path, tower: int) -> CLIPTokenizer:
    """CLIP's tokenizer for a tower (0, 1), from the first place that has it: the file's folder, the models folder,
    Hugging Face's cache. The second tower's pads with zeros. FileNotFoundError without one."""
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
    """The folder of openai/clip-vit-large-patch14 in Hugging Face's cache, if its tokenizer is there."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache("openai/clip-vit-large-patch14", name) for name in ("vocab.json", "merges.txt")]
    places = [Path(file).parent for file in files if isinstance(file, str)]
    return places[0] if len(places) == 2 else None
