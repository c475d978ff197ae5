"""Warnings about prompts that an encoder does not read as their writer meant them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from condit.encoders.clip_tokenizer import ClipTokenizer

log = logging.getLogger(__name__)

# A1111's syntax. A single pair of brackets may be text.
_WEIGHT = re.compile(r"\([^()]*:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\)")  # (fox:1.3)
_OTHER = re.compile(r"\(\([^()]+\)\)|\[\[[^][]+\]\]|\[[^][]*:[^][]*:\s*\d*\.?\d+\s*\]")  # ((fox)), [fox:wolf:0.5]
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>")


def warn_syntax(prompts: Sequence[str], *, weights: bool = False) -> None:
    """Logs a warning for A1111's prompt syntax where it is read as text. weights: the model reads (fox:1.3)."""
    for prompt in prompts:
        if found := _OTHER.search(prompt) or (None if weights else _WEIGHT.search(prompt)):
            remedy = "Write a weight as (fox:1.1)." if weights else "This model reads no prompt weights."
            log.warning("%r is read as text, with its brackets. %s", found[0], remedy)
        if found := _NETWORK.search(prompt):
            log.warning("%r is read as text. Load the LoRA by condit.StyleLoRA, or by --lora in a command.", found[0])


def warn_cut(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int) -> None:
    """Logs a warning for every prompt of more tokens than the encoder reads."""
    for prompt in prompts:
        # A token has a byte at least, so that short prompts need no second pass.
        if len(prompt.encode()) > limit - 2 and len(tokenizer(prompt, verbose=False)["input_ids"]) > limit:
            log.warning("The text encoder reads only the first %d tokens of this prompt: %r", limit, prompt)


def warn_cut_tiny(tokenizer: ClipTokenizer, prompts: Sequence[str]) -> None:
    """The same for the embedded CLIP, whose tokenizer returns what it cut off."""
    for prompt, encoding in zip(prompts, tokenizer.encode(prompts), strict=True):
        if encoding.overflowing:
            rest = prompt[encoding.offsets[-2][1] :].strip()
            log.warning(
                "The text encoder reads only the first %d tokens of a prompt; cut off: %r", tokenizer.limit, rest
            )
