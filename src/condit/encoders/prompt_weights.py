"""Weights in prompts for CLIP text towers, by compel: (fox)1.3, (fox)++, (fox)-, and A1111's (fox:1.3)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

_A1111 = re.compile(r"\(([^():]+):\s*(\d*\.?\d+)\s*\)")
_WEIGHT = re.compile(r"\(([^()]+)\)(\d*\.?\d+|\++|-+)")


def has_weights(prompt: str) -> bool:
    """Whether a prompt weighs a part in brackets; brackets without a weight are plain text."""
    return bool(_A1111.search(prompt) or _WEIGHT.search(prompt))


def plain_prompt(prompt: str) -> str:
    """The prompt without weights and their brackets."""
    return _WEIGHT.sub(r"\1", _A1111.sub(r"\1", prompt))


def weighted_states(
    tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, prompt: str, *, penultimate: bool, normed: bool
) -> Tensor:
    """Token states (1, L, C) of a weighted prompt. penultimate: before the last layer; normed: after the final norm."""
    from compel import Compel, ReturnedEmbeddingsType

    layer = "PENULTIMATE" if penultimate else "LAST"
    kind = ReturnedEmbeddingsType[f"{layer}_HIDDEN_STATES_{'NORMALIZED' if normed else 'NON_NORMALIZED'}"]
    dtype = next(encoder.parameters()).dtype
    tower = cast("CLIPTextModel", encoder)
    compel = Compel(tokenizer, tower, dtype_for_device_getter=lambda _: dtype, returned_embeddings_type=kind)
    return cast("Tensor", compel.build_conditioning_tensor(_A1111.sub(r"(\1)\2", prompt)))
