"""DEADiff's published checkpoint (arXiv:2403.06951, `deadiff_v1.ckpt`), split into parts and joined again by tables.

One file holds a Stable Diffusion 1.5, CLIP's image tower twice, both Q-Formers with their projections, and the 32 image
K', V' maps inside the UNet. `split` sorts its tensors; `join` is its exact inverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from condit.data.files import atomic_write
from condit.weights.files import inner_state
from condit.weights.guess import DEADIFF

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

UNET = "model.diffusion_model."
BASE = (UNET, "first_stage_model.", "cond_stage_model.")

# Published name -> ours (transformers' names after `qformer.`). {b}: style or content, {i}: a number, {x}: the rest;
# the first rule that fits counts. Tensors without a rule are never used: the MLM, ITM and projection heads of BLIP-2.
ADAPTER: Rules = (
    ("{b}_blip.Qformer.bert.embeddings.LayerNorm.{x}", "{b}.qformer.embeddings.layernorm.{x}"),
    ("{b}_blip.Qformer.bert.embeddings.{e}", "{b}.qformer.embeddings.{e}"),
    (
        "{b}_blip.Qformer.bert.encoder.layer.{i}.attention.self.{x}",
        "{b}.qformer.encoder.layer.{i}.attention.attention.{x}",
    ),
    (
        "{b}_blip.Qformer.bert.encoder.layer.{i}.crossattention.self.{x}",
        "{b}.qformer.encoder.layer.{i}.crossattention.attention.{x}",
    ),
    ("{b}_blip.Qformer.bert.encoder.layer.{i}.{x}", "{b}.qformer.encoder.layer.{i}.{x}"),
    ("{b}_blip.ln_vision.{x}", "{b}.ln_vision.{x}"),
    ("{b}_blip.query_tokens", "{b}.query_tokens"),
    ("{b}_proj_layer.{x}", "{b}.proj.{x}"),
)
# OpenAI's names of CLIP's image tower -> transformers'. q, k, v are one matrix there, three here.
TOWER: Rules = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("ln_pre.{x}", "pre_layrnorm.{x}"),
    ("transformer.resblocks.{i}.attn.out_proj.{x}", "encoder.layers.{i}.self_attn.out_proj.{x}"),
    ("transformer.resblocks.{i}.ln_1.{x}", "encoder.layers.{i}.layer_norm1.{x}"),
    ("transformer.resblocks.{i}.ln_2.{x}", "encoder.layers.{i}.layer_norm2.{x}"),
    ("transformer.resblocks.{i}.mlp.c_fc.{x}", "encoder.layers.{i}.mlp.fc1.{x}"),
    ("transformer.resblocks.{i}.mlp.c_proj.{x}", "encoder.layers.{i}.mlp.fc2.{x}"),
)
_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_APART = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")
# The maps inside a UNet in the original layout.
IMAGE_MAP = re.compile(r"model\.diffusion_model\.(.+)\.(transformer_blocks\.\d+)\.attn2\.i_to_([kv])\.weight")
_OUR_MAP = re.compile(r"unet\.(.+)\.(transformer_blocks\.\d+)\.attn2\.image_([kv])\.weight")
_PARTS = {"b": "style|content", "i": r"\d+", "e": r"(?:word|position)_embeddings\.weight", "x": ".+"}


@dataclass(frozen=True)
class Checkpoint:
    """A published file in parts. adapter: our names; tower: transformers' names; base: Stable Diffusion's UNet, VAE and
    text encoder under LDM's names, as single-file loaders read them; rest: unused tensors under their own names."""

    adapter: State
    tower: State
    base: State = field(default_factory=dict)
    rest: State = field(default_factory=dict)


def adapter_tensors(tensors: Mapping[str, Tensor], source: str | Path) -> State:
    """The tensors of a published file or one of ours under our names, and `tower.*` if they have an image tower."""
    if not any(name.startswith(DEADIFF) for name in tensors):
        return dict(tensors)
    parts = split(tensors, source)
    return parts.adapter | {f"tower.{name}": value for name, value in parts.tower.items()}


def blip_diffusion(reader: Mapping[str, Tensor], projection: Mapping[str, Tensor]) -> State:
    """One Q-Former's tensors from BLIP-Diffusion's release (`blip_weight.pt`, `proj_weight.pt`), with which the paper
    initialises both."""
    renamed: State = {}
    for name, value in inner_state(reader).items():
        # Older files call the Q-Former text_model.
        ours = to_ours(f"style_blip.{name.removeprefix('model.').replace('text_model.', 'Qformer.')}")
        if ours is not None:
            renamed[ours.removeprefix("style.")] = value.float()
    return renamed | {f"proj.{name}": value.float() for name, value in projection.items()}


def split(tensors: Mapping[str, Tensor], source: str | Path = "the file") -> Checkpoint:
    """A published file's tensors in parts. ValueError if the two image towers differ: one serves both here."""
    tensors = inner_state(tensors)
    adapter: State = {}
    towers: dict[str, State] = {"style": {}, "content": {}}
    base: State = {}
    rest: State = {}
    for name, value in tensors.items():
        branch, _, inner = name.partition("_blip.visual_encoder.")
        if inner and branch in towers:
            towers[branch][inner] = value
        elif (ours := to_ours(name)) is not None:
            adapter[ours] = value
        elif name.startswith(BASE):
            base[name] = value
        else:
            rest[name] = value
    style, content = towers["style"], towers["content"]
    different = [n for n in style if n in content and not torch.equal(style[n], content[n])]
    if content and (different or style.keys() != content.keys()):
        raise ValueError(
            f"{source}: the image towers of the two Q-Formers differ (first: {[*different, *style][0]}). They are one "
            "frozen CLIP in DEADiff. Was this file trained in another way?"
        )
    return Checkpoint(adapter, tower_to_ours(style), base, rest)


def join(checkpoint: Checkpoint) -> State:
    """All parts under their published names: the inverse of `split`. ValueError for a name that is not DEADiff's."""
    tower = _tower_to_published(checkpoint.tower)
    tensors = {f"{b}_blip.visual_encoder.{name}": value for b in ("style", "content") for name, value in tower.items()}
    for name, value in checkpoint.adapter.items():
        published = to_published(name)
        if published is None:
            raise ValueError(f"{name!r} has no published name: it is not a tensor of DEADiff.")
        tensors[published] = value
    return tensors | checkpoint.base | checkpoint.rest


def save_published(path: str | Path, checkpoint: Checkpoint, *, global_step: int = 0) -> Path:
    """Write a `.ckpt` that the released code loads: a pickle of tensors, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in join(checkpoint).items()}
    content = {"state_dict": tensors, "global_step": global_step}
    return atomic_write(path, lambda target: torch.save(content, target))


def to_ours(name: str) -> str | None:
    """Our name of an adapter's tensor; None for other tensors."""
    match = IMAGE_MAP.fullmatch(name)
    if match and (place := place_in_diffusers(match[1])) is not None:
        return f"unet.{place}.{match[2]}.attn2.image_{match[3]}.weight"
    return _renamed(name, ADAPTER, back=False)


def to_published(name: str) -> str | None:
    """The published name of an adapter's tensor; None for other tensors."""
    match = _OUR_MAP.fullmatch(name)
    if match and (place := _LDM.get(match[1])) is not None:
        return f"{UNET}{place}.{match[2]}.attn2.i_to_{match[3]}.weight"
    return _renamed(name, ADAPTER, back=True)


def place_in_diffusers(place: str) -> str | None:
    """'input_blocks.7.1' -> 'down_blocks.2.attentions.0', for UNets of two layers a level, as Stable Diffusion's."""
    if place == "middle_block.1":
        return "mid_block.attentions.0"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.1", place)
    if match is None:
        return None
    # Blocks of the way down come in threes (two layers, one downsampler) after the first convolution; up: three layers.
    level, layer = divmod(int(match[2]) - (match[1] == "input"), 3)
    return f"{'down' if match[1] == 'input' else 'up'}_blocks.{level}.attentions.{layer}"


_PLACES = ["middle_block.1", *(f"{side}_blocks.{number}.1" for side in ("input", "output") for number in range(12))]
_LDM = {place_in_diffusers(place): place for place in _PLACES}


def tower_to_ours(tower: Mapping[str, Tensor]) -> State:
    """CLIP's image tower from OpenAI's names to transformers', without `vision_model.`. ValueError for other names."""
    renamed: State = {}
    for name, value in tower.items():
        if match := _QKV.fullmatch(name):
            for part, third in zip(("q", "k", "v"), value.chunk(3), strict=True):
                renamed[f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = third
        elif (ours := _renamed(name, TOWER, back=False)) is not None:
            renamed[ours] = value
        else:
            raise ValueError(f"{name!r} is no tensor of CLIP's image tower.")
    return renamed


def _tower_to_published(tower: Mapping[str, Tensor]) -> State:
    renamed: State = {}
    for name, value in tower.items():
        if match := _APART.fullmatch(name):
            parts = [tower[name.replace("q_proj", f"{part}_proj")] for part in ("q", "k", "v")]
            renamed[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif (published := _renamed(name, TOWER, back=True)) is not None:
            renamed[published] = value
    return renamed


def _renamed(name: str, rules: Rules, *, back: bool) -> str | None:
    """The name by the first rule whose left side (right side if `back`) matches it; None without one."""
    for rule in rules:
        source, target = reversed(rule) if back else rule
        pattern = re.sub(r"\\\{(\w)\\\}", lambda m: f"(?P<{m[1]}>{_PARTS[m[1]]})", re.escape(source))
        if match := re.fullmatch(pattern, name):
            return target.format(**match.groupdict())
    return None
