"""The embedded CLIP: an image tower and a text tower in one space that separates concept from style.

`Clip` (Radford et al. 2021, arXiv:2103.00020) with a small configuration. Training matches concepts in the `CONCEPT`
dimensions of the shared space and styles in the `STYLE` dimensions (docs/tiny.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.encoders.clip_model import Clip
from condit.encoders.clip_tokenizer import ClipTokenizer

CONCEPT, STYLE = slice(0, 192), slice(192, 256)


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
