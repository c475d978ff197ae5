"""The weights of a network's blocks in one byte each: half the memory of bfloat16."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.nn.lora import Linear, LowRank

Quantise = Literal["float8", "int8"]
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "down_blocks.", "mid_block.", "up_blocks.")


class Float8Linear(Linear):
    """A `Linear` that keeps its weight in float8 (e4m3) and computes in the dtype of its input."""

    def __init__(self, like: Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.path = like.in_features, like.out_features, like.path
        self.weight = nn.Parameter(like.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = like.bias

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = F.linear(input, self.weight.to(input.dtype), self.bias)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


def in_blocks(module: nn.Module, path: str) -> bool:
    """Whether a module is quantised. Embeddings and head are not: few weights, on which every token depends."""
    return isinstance(module, Linear) and path.startswith(BLOCKS)


def quantise(backbone: nn.Module, how: Quantise) -> None:
    """Replace the weights of all linear layers in the blocks, in place. "float8" is a plain cast, as in the public fp8
    files; "int8" has a scale per row, by torchao (pip install 'condit[quantize]'). ValueError for another `how`,
    ImportError without torchao."""
    if how == "float8":
        for path, module in list(backbone.named_modules()):
            if in_blocks(module, path):
                parent, _, name = path.rpartition(".")
                assert isinstance(module, Linear)
                backbone.get_submodule(parent).add_module(name, Float8Linear(module))
        return
    if how != "int8":
        raise ValueError(f"quantize must be 'float8' or 'int8'; found {how!r}.")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(
            "quantize='int8' needs torchao: pip install 'condit[quantize]'. quantize='float8' needs nothing."
        ) from error
    quantize_(backbone, Int8WeightOnlyConfig(), filter_fn=in_blocks)
