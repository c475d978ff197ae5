"""Random pipelines of diffusers as single files in the names of Stable Diffusion's authors."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import condit
from condit.backbones.unet import CROSS_UP, UNetConfig
from condit.diffusion.vp import Process
from condit.weights.original_sd import Original, Tower

UNET, VAE = "model.diffusion_model.", "first_stage_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name: str, c: UNetConfig) -> str:
    """The authors' name of a tensor of diffusers' UNet."""
    for new, old in ENDS.items():
        if name.startswith(new + "."):
            return old + name.removeprefix(new)
    mid = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if mid:
        number = 1 if mid[1] == "attentions" else 2 * int(mid[2])
        return f"middle_block.{number}.{inside(mid[3]) if mid[1] == 'resnets' else mid[3]}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert match is not None, name
    level, layer, rest = int(match[2]), int(match[4]), match[5]
    down = match[1] == "down"
    a_level = c.layers_per_block + 1
    number = level * a_level + layer + 1 if down else level * a_level + layer
    place = f"{'input' if down else 'output'}_blocks"
    if match[3] == "resnets":
        return f"{place}.{number}.0.{inside(rest)}"
    if match[3] == "attentions":
        return f"{place}.{number}.1.{rest}"
    if match[3] == "downsamplers":
        return f"{place}.{(level + 1) * a_level}.0.{rest.replace('conv.', 'op.')}"
    behind = 2 if c.up_block_types[level] == CROSS_UP else 1
    return f"{place}.{(level + 1) * a_level - 1}.{behind}.{rest}"


def inside(name: str) -> str:
    new = next(n for n in RESNET if name.startswith(n + "."))
    return RESNET[new] + name.removeprefix(new)


def original_vae_name(name: str, levels: int) -> str:
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1.", name)
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    name = (
        name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    )
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def original_vae(vae: torch.nn.Module) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)  # type: ignore[union-attr,arg-type]
    tensors = {VAE + original_vae_name(n, levels): t for n, t in vae.state_dict().items()}
    # What is a linear today was a 1 x 1 convolution.
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in tensors.items()}


def open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text tower of transformers under OpenCLIP's names."""
    state = {n.removeprefix("text_model."): t for n, t in state.items()}
    tensors = {"logit_scale": torch.ones(())}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)
        name = name.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
        name = name.replace("self_attn.out_proj", "attn.out_proj").replace("fc1", "c_fc").replace("fc2", "c_proj")
        name = name.replace("embeddings.token_embedding.", "token_embedding.").replace("final_ln_", "ln_final")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.mT.contiguous()
        tensors[name] = tensor
    return {prefix + name: tensor for name, tensor in tensors.items()}


def single_file(pipe, path: Path, kind: str) -> dict[str, Original]:
    """Writes a pipeline of diffusers as one file; returns what is to be known of it."""
    config = condit.load(path.parent / kind).backbone.config
    tensors = {UNET + original_unet_name(n, config): t for n, t in pipe.unet.state_dict().items()} | original_vae(
        pipe.vae
    )
    flat = {n.removeprefix("text_model."): t for n, t in pipe.text_encoder.state_dict().items()}
    first = "conditioner.embedders.0.transformer." if kind == "sdxl" else "cond_stage_model.transformer."
    tensors |= {f"{first}text_model.{n}": t for n, t in flat.items()}
    tensors[f"{first}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(3)}
    towers = [Tower(first, pipe.text_encoder.config.to_dict())]
    if kind == "sdxl":
        second = "conditioner.embedders.1.model."
        tensors |= open_clip(pipe.text_encoder_2.state_dict(), second)
        towers.append(Tower(second, pipe.text_encoder_2.config.to_dict(), open_clip=True))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return {kind: Original(config, dict(pipe.vae.config), tuple(towers), Process())}
