"""Text encoders behind one call: prompts -> token states, pooled vector and, for the embedded model, a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from condit.encoders.clip import TOKEN_LIMIT, embed_text, token_ids
from condit.encoders.words import Words, words_of

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens (B, L, C), pooled (B, P); canvas (B, N, K) or None: a coarse picture that the words call
    up, one row an image token, fed beside the noisy latent (as FLUX.1 Fill feeds its mask)."""

    tokens: Tensor
    pooled: Tensor
    canvas: Tensor | None = None

    def rows(self, index: Tensor) -> Text:
        """The prompts at `index` (B',)."""
        canvas = None if self.canvas is None else self.canvas[index]
        return Text(self.tokens[index], self.pooled[index], canvas)


class TextEncoder(Protocol):
    """What the pipeline needs."""

    def __call__(self, prompts: Sequence[str]) -> Text: ...

    def words(self, prompts: Sequence[str]) -> list[Words]: ...


class TinyText(nn.Module):
    """The embedded CLIP's text tower, and the canvas: a linear map from its pooled vector to thumbnails of the icons.

    The map is solved by ridge regression over training captions before the transformer is trained (docs/tiny.md).
    """

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, *, tokens: int = 64, channels: int = 16):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.tokens, self.channels = tokens, channels
        self.canvas = nn.Linear(clip.config.projection_dim, tokens * channels)

    def forward(self, prompts: Sequence[str]) -> Text:
        """Prompts -> states of all 24 tokens, pooled vector of unit variance, canvas. No gradient."""
        with torch.no_grad():
            ids = token_ids(self.tokenizer, list(prompts)).to(self.canvas.weight.device)
            states, embedding = embed_text(self.clip, ids)
            pooled = self.pooled(embedding)
            canvas = self.canvas(pooled.to(self.canvas.weight.dtype)).unflatten(-1, (self.tokens, self.channels))
        return Text(states, pooled, canvas)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The prompts as words over the token states."""
        return words_of(self.tokenizer, prompts, TOKEN_LIMIT)

    def pooled(self, embedding: Tensor) -> Tensor:
        """Unit-length parts -> entries of about unit variance."""
        return embedding * (embedding.shape[-1] / 2) ** 0.5

    @torch.no_grad()
    def fit_canvas(self, pooled: Tensor, thumbnails: Tensor, *, ridge: float = 1e-2) -> None:
        """Ridge regression of thumbnails (n, tokens * channels) on pooled vectors (n, P)."""
        mean_x, mean_y = pooled.mean(0), thumbnails.mean(0)
        x, y = (pooled - mean_x).double(), (thumbnails - mean_y).double()
        gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, x.T @ y / len(x)).T.float()
        self.canvas.weight.copy_(weight)
        self.canvas.bias.copy_(mean_y - weight @ mean_x)


class FluxText(nn.Module):
    """FLUX.1's two text encoders: T5 token states (limit 512) and CLIP's pooled vector."""

    def __init__(self, clip, clip_tokenizer, t5, t5_tokenizer, *, limit: int = 512):
        super().__init__()
        self.clip, self.t5, self.limit = clip, t5, limit
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Text:
        def ids(tokenizer, limit: int) -> Tensor:
            return tokenizer(
                list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            ).input_ids

        pooled = self.clip(ids(self.clip_tokenizer, 77).to(self.clip.device)).pooler_output
        tokens = self.t5(ids(self.t5_tokenizer, self.limit).to(self.t5.device))[0]
        return Text(tokens.to(pooled.device), pooled)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The prompts as words over T5's token states."""
        return words_of(self.t5_tokenizer, prompts, self.limit)
