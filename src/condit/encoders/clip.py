"""The embedded CLIP: an image tower and a text tower in one space that separates concept from style.

transformers' `CLIPModel` (Radford et al. 2021, arXiv:2103.00020) with a small configuration. Training matches concepts
in the `CONCEPT` dimensions of the shared space and styles in the `STYLE` dimensions (docs/tiny.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

CONCEPT, STYLE = slice(0, 192), slice(192, 256)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
TOKEN_LIMIT = 24


class TowerConfig(Protocol):
    """Sizes in the configuration of one of CLIP's towers; only image towers have image_size and patch_size."""

    hidden_size: int
    projection_dim: int
    num_hidden_layers: int
    image_size: int
    patch_size: int


def make_clip(vocab_size: int) -> CLIPModel:
    """A CLIP for 128 px icons with random weights."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "max_position_embeddings": TOKEN_LIMIT,
        "hidden_act": "gelu",
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 128,
        "patch_size": 16,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=STYLE.stop)
    # At these lengths the backward pass of plain attention is faster on CPUs.
    config._attn_implementation = "eager"
    return CLIPModel(config)


def make_tokenizer(corpus: Iterable[str], vocab_size: int = 5000) -> PreTrainedTokenizerFast:
    """WordPiece on lower-case words and single Chinese characters; unknown words are split into pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=TOKEN_LIMIT,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """(B, TOKEN_LIMIT) token numbers, truncated and padded."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def normalise(embeddings: Tensor) -> Tensor:
    """Unit length for the concept part and for the style part, (B, 256) -> (B, 256)."""
    return torch.cat([F.normalize(embeddings[:, CONCEPT], dim=-1), F.normalize(embeddings[:, STYLE], dim=-1)], -1)


def embed_text(clip: CLIPModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token states (B, L, 192) and the normalised embedding (B, 256)."""
    out = clip.text_model(input_ids=ids)
    return out.last_hidden_state, normalise(clip.text_projection(out.pooler_output))


def embed_image(clip: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 128, 128) in [-1, 1] -> hidden states of every layer (L + 1, B, 65, 192), embedding (B, 256)."""
    out = clip.vision_model(pixel_values=images, output_hidden_states=True)
    return torch.stack(out.hidden_states), normalise(clip.visual_projection(out.pooler_output))


def style_statistics(hidden: Tensor, layers: tuple[int, ...] = (2, 4)) -> Tensor:
    """Mean and standard deviation over the patches of two middle layers, (L + 1, B, 65, 192) -> (B, 768).

    Without positions they describe style more than content (Gatys et al. 2016, here on a ViT). Each of the four vectors
    is normalised to zero mean and unit variance, so that none dominates.
    """
    statistics = []
    for layer in layers:
        patches = hidden[layer][:, 1:].float()
        statistics += [F.layer_norm(x, x.shape[-1:]) for x in (patches.mean(1), patches.std(1))]
    return torch.cat(statistics, -1)
