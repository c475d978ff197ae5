"""The embedded CLIP: an image tower and a text tower in one space that separates concept from style.

`Clip` (Radford et al. 2021, arXiv:2103.00020) with a small configuration. Training matches concepts in the `CONCEPT`
dimensions of the shared space and styles in the `STYLE` dimensions (docs/tiny.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.encoders.clip_model import Clip, ClipConfig, TextConfig, VisionConfig
from condit.encoders.clip_tokenizer import SPECIAL_TOKENS, TOKEN_LIMIT, ClipTokenizer

CONCEPT, STYLE = slice(0, 192), slice(192, 256)


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
    clip.load_state_dict(CLIPModel(config.to_transformers()).state_dict(), strict=True, assign=True)
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


def token_ids(tokenizer: ClipTokenizer, texts: list[str]) -> Tensor:
    """(B, TOKEN_LIMIT) token ids, truncated and padded."""
    return tokenizer.ids(texts)


def normalise(embeddings: Tensor) -> Tensor:
    """Unit length for the concept part and for the style part, (B, 256) -> (B, 256)."""
    return torch.cat([F.normalize(embeddings[:, CONCEPT], dim=-1), F.normalize(embeddings[:, STYLE], dim=-1)], -1)


def embed_text(clip: Clip, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token states (B, L, 192) and the normalised embedding (B, 256)."""
    out = clip.text_model(ids)
    return out.last_hidden_state, normalise(clip.text_projection(out.pooler_output))


def embed_image(clip: Clip, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 128, 128) in [-1, 1] -> hidden states of every layer (L + 1, B, 65, 192), embedding (B, 256)."""
    out = clip.vision_model(images)
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
