"""A Q-Former that a word instructs: learned queries extract from an image what the word names (BLIP-Diffusion, Li et
al. 2023, arXiv:2305.14720; DEADiff, arXiv:2403.06951).

The transformer is transformers' `InstructBlipQFormerModel` with cross-attention in every layer. It computes the same as
the LAVIS class of the released code: queries first, without positions, then the word; one LayerNorm over both.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# [CLS] word [SEP] in the vocabulary of BERT uncased. The released Q-Formers were trained on these words only.
BERT_WORDS: dict[str, tuple[int, ...]] = {"style": (101, 2806, 102), "content": (101, 4180, 102)}


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are those of the released checkpoint. image_width: width of the image tokens. vocabulary:
    BERT's and one more, [DEC]."""

    queries: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    image_width: int = 1024
    vocabulary: int = 30523
    positions: int = 512

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], heads: int | None = None, source: object = "the file") -> QFormerConfig:
        """Sizes from the tensors of a `QFormer`, except for heads; None: heads of width 64. ValueError names a missing
        tensor."""
        first = "qformer.encoder.layer.0"
        required = ["query_tokens", f"{first}.intermediate_query.dense.weight"]
        required += [f"{first}.crossattention.attention.key.weight"]
        required += [f"qformer.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
        missing = [name for name in required if name not in tensors]
        if missing:
            near = difflib.get_close_matches(missing[0], list(tensors), 3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"{source}: {missing[0]!r} is missing from {len(tensors)} tensors of a Q-Former{hint}.")
        width = tensors["query_tokens"].shape[-1]
        return cls(
            queries=tensors["query_tokens"].shape[1],
            width=width,
            layers=len({name.split(".")[3] for name in tensors if name.startswith("qformer.encoder.layer.")}),
            heads=heads or width // 64,
            hidden=tensors[f"{first}.intermediate_query.dense.weight"].shape[0],
            image_width=tensors[f"{first}.crossattention.attention.key.weight"].shape[1],
            vocabulary=tensors["qformer.embeddings.word_embeddings.weight"].shape[0],
            positions=tensors["qformer.embeddings.position_embeddings.weight"].shape[0],
        )


class Projection(nn.Module):
    """x + W2 quickgelu(W1 LN(x)), with dropout after W2; the norm acts on the MLP's input, not on the residual."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.LayerNorm, self.dropout = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dense1(self.LayerNorm(x))
        return x + self.dropout(self.dense2(h * torch.sigmoid(1.702 * h)))


class QFormer(nn.Module):
    """Image tokens and a word -> `queries` tokens in the width of the text encoder."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

        self.config = c = config
        self.query_tokens = nn.Parameter(torch.zeros(1, c.queries, c.width).normal_(std=0.02))
        self.ln_vision = nn.LayerNorm(c.image_width)
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                vocab_size=c.vocabulary,
                hidden_size=c.width,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                intermediate_size=c.hidden,
                max_position_embeddings=c.positions,
                cross_attention_frequency=1,
                encoder_hidden_size=c.image_width,
            )
        )
        self.proj = Projection(c.width, 4 * c.width)

    def forward(self, image: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Image tokens (B, N, image_width) of the tower, token numbers of the word (B, L), mask (B, L) with 0 = padding
        -> (B, queries, width) in float32."""
        return self.proj(self.read(image, ids, mask)[:, : self.config.queries])

    def read(self, image: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """States of all tokens before the projection: queries, then the word, (B, queries + L, width)."""
        image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
        queries = self.query_tokens.expand(len(image), -1, -1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(image), self.config.queries), mask], 1)
        # There is no mask of image tokens, as queries attend to all of them.
        output = self.qformer(input_ids=ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=image)
        return output.last_hidden_state


def word_ids(word: str, batch: int, words: Mapping[str, Sequence[int]] = BERT_WORDS) -> Tensor:
    """Token numbers (batch, L) of a word on which the Q-Formers were trained. Raises ValueError for another word."""
    if word not in words:
        raise ValueError(f"The Q-Formers were trained on {', '.join(map(repr, words))}; found {word!r}.")
    return torch.tensor([list(words[word])]).expand(batch, -1)
