"""A LoRA file's tensors for CLIP text encoders, in the layouts of kohya, diffusers and peft."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def text_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A file's tensors for text encoders -> A and B of each layer, B with alpha / r. ValueError for what is no pair."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = re.sub(r"\.weight$", "", name).rpartition(".")
        layer, part = re.sub(r"\.(lora|lora_linear_layer)$", "", layer), part.removeprefix("lora_")
        sides.setdefault(layer, {})[{"down": "A", "up": "B"}.get(part, part)] = tensor
    pairs = {}
    for layer, parts in sides.items():
        if not {"A", "B"} <= parts.keys() <= {"A", "B", "alpha"}:
            raise ValueError(
                f"{layer!r} has the tensors {', '.join(parts)}; a text encoder's LoRA has down, up and alpha."
            )
        rank = parts["A"].shape[0]
        factor = float(parts.get("alpha", torch.tensor(float(rank)))) / rank
        pairs[layer] = parts["A"], parts["B"] * factor
    return pairs
