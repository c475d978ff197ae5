"""A Q-Former asked by a word: learned queries read an image and keep what the word names (BLIP-Diffusion, Li et al.
2023, arXiv:2305.14720; as DEADiff uses it, arXiv:2403.06951).

The transformer is transformers' `InstructBlipQFormerModel` with cross-attention in every layer. It computes what the
LAVIS class of the released code does: queries first, without positions, then the word; one LayerNorm over both.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# [CLS] word [SEP] in the vocabulary of BERT uncased. The released Q-Formers were never asked for another word.
BERT_WORDS: dict[str, tuple[int, ...]] = {"style": (101, 2806, 102), "content": (101, 4180, 102)}


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are those of the released checkpoint. image_width: width of the image tokens that it reads.
    vocabulary: BERT's and one more, [DEC]."""

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
        """Sizes read off the tensors of a `QFormer`; heads cannot be, and are of width 64 unless told. ValueError names
        a tensor that is missing."""
        first = "qformer.encoder.layer.0"
        needed = ["query_tokens", f"{first}.intermediate_query.dense.weight"]
        needed += [f"{first}.crossattention.attention.key.weight"]
        needed += [f"qformer.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
        missing = [name for name in needed if name not in tensors]
        if missing:
            near = difflib.get_close_matches(missing[0], list(tensors), 3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"{source}: no {missing[0]!r} among {len(tensors)} tensors of a Q-Former{hint}.")
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
    """x + W2 quickgelu(W1 LN(x)), with dropout after W2: the norm stands before the MLP, the residual is not normed."""

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
        """Image tokens (B, N, image_width) as they leave the tower, word numbers (B, L), mask (B, L) with 0 = padding
        -> (B, queries, width) in float32."""
        return self.proj(self.read(image, ids, mask)[:, : self.config.queries])

    def read(self, image: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """States of all tokens before the projection: queries, then the word, (B, queries + L, width)."""
        image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
        queries = self.query_tokens.expand(len(image), -1, -1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(image), self.config.queries), mask], 1)
        found = self.qformer(
            input_ids=ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=image
        )  # every image token is seen, so there is no mask for them
        return found.last_hidden_state


def word_ids(word: str, batch: int, words: Mapping[str, Sequence[int]] = BERT_WORDS) -> Tensor:
    """Token numbers (batch, L) of a word that the Q-Formers know. ValueError for another one."""
    if word not in words:
        raise ValueError(f"The Q-Formers were trained on {', '.join(map(repr, words))}; found {word!r}.")
    return torch.tensor([list(words[word])]).expand(batch, -1)
