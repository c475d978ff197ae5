"""The embedded CLIP around its training: random weights, a tokenizer of a corpus, files in transformers' layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from condit.encoders.clip import STYLE
from condit.encoders.clip_model import Clip, ClipConfig, TextConfig, VisionConfig
from condit.encoders.clip_tokenizer import SPECIAL_TOKENS, TOKEN_LIMIT, ClipTokenizer

if TYPE_CHECKING:
    from transformers import CLIPConfig


def make_clip(vocab_size: int) -> Clip:
    """A CLIP for 128 px icons with random weights, initialised as transformers does."""
    from transformers import CLIPModel

    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    config = ClipConfig(
        TextConfig(
            **sizes,
            num_hidden_layers=4,
            vocab_size=vocab_size,
            max_position_embeddings=TOKEN_LIMIT,
            eos_token_id=SPECIAL_TOKENS.index("[EOS]"),
        ),
        VisionConfig(**sizes, num_hidden_layers=6, image_size=128, patch_size=16),
        projection_dim=STYLE.stop,
    )
    with torch.device("meta"):
        clip = Clip(config)
    clip.load_state_dict(CLIPModel(to_transformers(config)).state_dict(), strict=True, assign=True)
    return clip


def make_tokenizer(corpus: Iterable[str], vocab_size: int = 5000) -> ClipTokenizer:
    """WordPiece on lower-case words and single Chinese characters; unknown words are split into pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=letters, show_progress=False
    )
    # A letter after another one makes the piece "##x", without which an unknown word could not be split.
    tokenizer.train_from_iterator(chain(corpus, (f"a{letter}" for letter in letters)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return ClipTokenizer(tokenizer)


def to_transformers(config: ClipConfig) -> CLIPConfig:
    """The same configuration as transformers' class, with eager attention."""
    from transformers import CLIPConfig

    # pad and bos are read by nobody, but transformers' defaults lie outside a small vocabulary.
    text = {**asdict(config.text_config), "hidden_act": "gelu", "pad_token_id": 0, "bos_token_id": 2}
    vision = {**asdict(config.vision_config), "hidden_act": "gelu"}
    theirs = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim)
    theirs._attn_implementation = "eager"
    return theirs


def save_clip(clip: Clip, folder: str | Path) -> None:
    """Write config.json and model.safetensors in transformers' layout, in the dtype of the parameters."""
    from transformers import CLIPModel

    model = CLIPModel(to_transformers(clip.config))
    model.load_state_dict(clip.state_dict(), strict=True, assign=True)
    model.save_pretrained(folder)


def save_tokenizer(tokenizer: ClipTokenizer, folder: str | Path) -> None:
    """Write the files of transformers' fast tokenizer."""
    from transformers import PreTrainedTokenizerFast

    pad, unk, bos, eos = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=tokenizer.limit,
    ).save_pretrained(folder)
