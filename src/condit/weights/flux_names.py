"""FLUX.1's names in its authors' files -> diffusers' names, as tables.

Tensors are renamed and split by rows: one matrix of the authors holds queries, keys and values, and in single blocks
also the MLP's first layer. The head's modulation has shift and scale in the other order."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# A block's modules (with kohya's underscores) -> diffusers' paths. Several paths: one matrix is split by rows.
DOUBLE = {
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation_lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
# Modules that adapters name and the authors' weights do not: the first three parts of linear1.
SINGLE_ADAPTED = {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}
WHOLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "final_layer_linear": "proj_out",
}
# Norms of queries and keys, which no LoRA adapts. Their tensors are called `scale`, in some files `weight`.
NORMS = {
    "double": {
        "img_attn_norm_query_norm": "attn.norm_q",
        "img_attn_norm_key_norm": "attn.norm_k",
        "txt_attn_norm_query_norm": "attn.norm_added_q",
        "txt_attn_norm_key_norm": "attn.norm_added_k",
    },
    "single": {"norm_query_norm": "attn.norm_q", "norm_key_norm": "attn.norm_k"},
}
# A block and its number in either spelling: double_blocks.3.img_attn.qkv, double_blocks_3_img_attn_qkv.
BLOCK = re.compile(r"(double|single)_blocks[._](\d+)[._](.+)")


def parts(module: str, rows: Tensor, width: int) -> list[tuple[str, Tensor]] | None:
    """Diffusers' paths of a module, each with its rows of the module's tensor; None for a module outside the blocks
    that FLUX.1 does not have. width: of the model. ValueError for an unknown part of a block."""
    match = BLOCK.fullmatch(module)
    if match is None:
        path = WHOLE.get(module.replace(".", "_"))
        # The authors' order is (shift, scale), that of diffusers' norm_out (scale, shift).
        return None if path is None else [(path, torch.cat(rows.chunk(2)[::-1]) if path == "norm_out.linear" else rows)]
    kind, number, part = match.groups()
    spelled = part.replace(".", "_")
    norm = NORMS[kind].get(spelled)
    table = DOUBLE if kind == "double" else SINGLE | SINGLE_ADAPTED
    paths = (norm,) if norm else table.get(spelled)
    if paths is None:
        raise ValueError(f"{module!r}: FLUX's {kind} blocks have no {part!r}. Is this of another model?")
    blocks = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    return [
        (f"{blocks}.{number}.{path}", piece)
        for path, piece in zip(paths, split(module, rows, paths, width), strict=True)
    ]


def split(module: str, rows: Tensor, paths: Sequence[str], width: int) -> Sequence[Tensor]:
    """One matrix by rows: queries, keys and values are as wide as the model, the rest is the MLP's."""
    if len(paths) == 1:
        return [rows]
    sizes = [width] * (len(paths) - 1) + [rows.shape[0] - width * (len(paths) - 1)]
    if min(sizes) <= 0:
        raise ValueError(f"{module!r} has {rows.shape[0]} rows, too few for {len(paths)} parts of {width}.")
    return rows.split(sizes)
