"""Names and shapes of a ViT's tensors in every published layout, from ours (timm's) and back.

`npz` and `linen` are the authors' archives, with kernels (in, out) and a dimension for heads; `transformers` has
separate q, k and v."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["npz", "linen", "timm", "transformers"]
State = dict[str, Tensor]

# Our module (timm's name) -> the layout's. `#`: the number of a block; commas: the parts of one fused matrix.
# The released archives count all sublayers of a block together (0, 1, 2, 3), today's linen code each class separately.
_NPZ = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed.proj": "embedding",
    "blocks.#.norm1": "Transformer/encoderblock_#/LayerNorm_0",
    "blocks.#.attn.qkv": "Transformer/encoderblock_#/MultiHeadDotProductAttention_1/query,key,value",
    "blocks.#.attn.proj": "Transformer/encoderblock_#/MultiHeadDotProductAttention_1/out",
    "blocks.#.norm2": "Transformer/encoderblock_#/LayerNorm_2",
    "blocks.#.mlp.fc1": "Transformer/encoderblock_#/MlpBlock_3/Dense_0",
    "blocks.#.mlp.fc2": "Transformer/encoderblock_#/MlpBlock_3/Dense_1",
    "norm": "Transformer/encoder_norm",
    "pre_logits.fc": "pre_logits",
    "head": "head",
}
_TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.#.norm1": "encoder.layer.#.layernorm_before",
    "blocks.#.attn.qkv": "encoder.layer.#.attention.attention.query,key,value",
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
    "blocks.#.norm2": "encoder.layer.#.layernorm_after",
    "blocks.#.mlp.fc1": "encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.fc2": "encoder.layer.#.output.dense",
    "norm": "layernorm",
    "pre_logits.fc": "pooler.dense",
    "head": "classifier",
}
_TABLES: dict[str, dict[str, str]] = {
    "npz": _NPZ,
    "linen": _NPZ
    | {
        "blocks.#.attn.qkv": "Transformer/encoderblock_#/MultiHeadDotProductAttention_0/query,key,value",
        "blocks.#.attn.proj": "Transformer/encoderblock_#/MultiHeadDotProductAttention_0/out",
        "blocks.#.norm2": "Transformer/encoderblock_#/LayerNorm_1",
        "blocks.#.mlp.fc1": "Transformer/encoderblock_#/MlpBlock_0/Dense_0",
        "blocks.#.mlp.fc2": "Transformer/encoderblock_#/MlpBlock_0/Dense_1",
    },
    "timm": {name: name for name in (*_NPZ, "fc_norm")},
    "transformers": _TRANSFORMERS,
    # transformers >= 5 renames in memory; its files keep the names above.
    "transformers5": _TRANSFORMERS
    | {
        "blocks.#.norm1": "layers.#.layernorm_before",
        "blocks.#.attn.qkv": "layers.#.attention.q_proj,k_proj,v_proj",
        "blocks.#.attn.proj": "layers.#.attention.o_proj",
        "blocks.#.norm2": "layers.#.layernorm_after",
        "blocks.#.mlp.fc1": "layers.#.mlp.fc1",
        "blocks.#.mlp.fc2": "layers.#.mlp.fc2",
    },
}
# Tried in this order: a piece of a tensor's name -> the layout.
_MARKS = {
    "npz": "/MultiHeadDotProductAttention_1/",
    "linen": "/MultiHeadDotProductAttention_0/",
    "timm": ".attn.qkv.",
    "transformers": ".attention.attention.",
    "transformers5": ".attention.q_proj.",
}
JAX = ("npz", "linen")


def find_layout(tensors: Mapping[str, Tensor]) -> str | None:
    return next((layout for layout, mark in _MARKS.items() if any(mark in name for name in tensors)), None)


def names_in_layout(native: str, layout: str) -> tuple[str, ...]:
    """The layout's names of one of our tensors: three where it has separate q, k and v, none where it has no such
    tensor."""
    module, leaf = (native, "") if native in ("cls_token", "pos_embed") else native.rsplit(".", 1)
    number = re.search(r"\d+", module)
    template = _TABLES[layout].get(re.sub(r"\d+", "#", module, count=1) if module.startswith("blocks.") else module)
    if template is None:
        return ()
    slash = "/" if layout in JAX else "."
    if layout in JAX and leaf == "weight":
        leaf = "scale" if "norm" in module else "kernel"
    head, _, tail = template.rpartition(slash) if "," in template else ("", "", template)
    paths = [f"{head}{slash}{part}" if head else part for part in tail.split(",")]
    names = [f"{path}{slash}{leaf}" if leaf else path for path in paths]
    return tuple(name.replace("#", number[0]) if number else name for name in names)


def to_native(tensors: Mapping[str, Tensor], layout: str) -> tuple[State, State]:
    """Our tensors, and those of the file that are not among them."""
    pattern = re.compile(r"(?:encoderblock_|blocks\.|layers?\.)(\d+)")
    numbers = [int(match[1]) for name in tensors if (match := pattern.search(name))]
    depth = min(max(numbers, default=-1) + 1, len(tensors))  # a hostile number does not make a long loop
    state: State = {}
    rest = dict(tensors)
    for native in all_names(depth):
        names = names_in_layout(native, layout)
        parts = [tensors[name] for name in names if name in tensors]
        if not parts or len(parts) < len(names) or len({x.shape for x in parts}) > 1:
            continue  # `read_vit` reports missing tensors, `load_strict` unexpected ones
        parts = [_from_jax(x, native) if layout in JAX else x for x in parts]
        state[native] = (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
        for name in names:
            del rest[name]
    return state, rest


def all_names(depth: int) -> list[str]:
    """Every tensor that a ViT of this depth may have."""
    modules = [name for name in _TABLES["timm"] if name not in ("cls_token", "pos_embed")]
    numbered = [m.replace("#", str(i)) for m in modules if "#" in m for i in range(depth)]
    plain = [m for m in modules if "#" not in m]
    return ["cls_token", "pos_embed", *(f"{m}.{leaf}" for m in (*plain, *numbered) for leaf in ("weight", "bias"))]


def required(state: State) -> list[str]:
    """The tensors that a ViT of this depth needs: all but the class token, and the heads and norm that it has no part
    of."""
    optional = {"cls_token"}
    for module in ("pre_logits.fc", "head", "norm" if "fc_norm.weight" in state else "fc_norm"):
        pair = {f"{module}.weight", f"{module}.bias"}
        optional |= set() if pair & state.keys() else pair
    return [name for name in all_names(depth_of(state)) if name not in optional]


def depth_of(state: State) -> int:
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=0)


def _from_jax(x: Tensor, native: str) -> Tensor:
    """(in, out) -> (out, in), HWIO -> OIHW; heads flattened, head by head. Tensors of another rank stay, and loading
    then refuses them."""
    if native.endswith("bias"):
        return x.flatten()
    if native.startswith("patch_embed") and x.ndim == 4:
        return x.permute(3, 2, 0, 1)
    if native.endswith("attn.qkv.weight") and x.ndim == 3:  # (in, heads, head dim)
        return x.flatten(1).T
    if native.endswith("attn.proj.weight") and x.ndim == 3:  # (heads, head dim, out)
        return x.flatten(0, 1).T
    return x.T if x.ndim == 2 else x


def _to_jax(x: Tensor, native: str, heads: int) -> Tensor:
    """The inverse of `_from_jax`."""
    if native.endswith("attn.qkv.bias"):
        return x.unflatten(0, (heads, -1))
    if native.startswith("patch_embed") and x.ndim == 4:
        return x.permute(2, 3, 1, 0)
    if native.endswith("attn.qkv.weight"):
        return x.T.unflatten(1, (heads, -1))
    if native.endswith("attn.proj.weight"):
        return x.T.unflatten(0, (heads, -1))
    return x.T if x.ndim == 2 else x


def to_layout(state: Mapping[str, Tensor], layout: Layout, heads: int) -> State:
    """A `ViT` state under the names and in the shapes of a layout; transformers' without the prefix `vit.`."""
    tensors: State = {}
    for native, x in state.items():
        names = names_in_layout(native, layout)
        if not names:
            raise ValueError(f"The layout {layout!r} has no place for {native}. Use another layout.")
        for name, part in zip(names, x.detach().chunk(len(names)), strict=True):
            tensors[name] = (_to_jax(part, native, heads) if layout in JAX else part).contiguous()
    return tensors
