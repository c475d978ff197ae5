"""Text encoders with one interface: prompts -> token states, pooled vector and, for the embedded model, a canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from condit.encoders.clip import embed_text, token_ids
from condit.encoders.clip_model import Clip
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.encoders.pickling import picklable_state
from condit.encoders.prompt_weights import has_weights, plain_prompt, weighted_states
from condit.encoders.prompts import warn_cut, warn_cut_tiny
from condit.encoders.words import Words, words_of

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel


@dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens (B, L, C); pooled (B, P), P = 0 for a model without pooled text; mask (B, L) or None: 1
    for a token, 0 for padding; canvas (B, N, K) or None: a coarse image predicted from the text, one row for each image
    token, which enters as more channels of the noisy latent (as the mask of FLUX.1 Fill does)."""

    tokens: Tensor
    pooled: Tensor
    canvas: Tensor | None = None
    mask: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Text:
        """A text with `change` applied to every part that is not None."""
        canvas, mask = (None if part is None else change(part) for part in (self.canvas, self.mask))
        return Text(change(self.tokens), change(self.pooled), canvas, mask)

    def rows(self, index: Tensor) -> Text:
        """The prompts at `index` (B',)."""
        return self.each(lambda part: part[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Text:
        """The text on a device, with tokens and pooled vector in `dtype`."""
        moved = self.each(lambda part: part.to(device))
        return replace(moved, tokens=moved.tokens.to(dtype), pooled=moved.pooled.to(dtype))


P = TypeVar("P")


def given_text(prompt: P, embeds: Tensor | None, pooled: Tensor | None) -> P | Text:
    """The prompt, or the text of its embeddings (B, L, C) and pooled vector (B, P). Raises ValueError for both, and for
    a pooled vector alone."""
    if embeds is None:
        if pooled is not None:
            raise ValueError("A pooled prompt embedding needs the embeddings of its tokens: give both.")
        return prompt
    if prompt is not None:
        raise ValueError("Give a prompt or its embeddings, not both.")
    if embeds.ndim != 3 or (pooled is not None and (pooled.ndim != 2 or len(pooled) != len(embeds))):
        shapes = tuple(embeds.shape), None if pooled is None else tuple(pooled.shape)
        raise ValueError(f"prompt embeddings must be (B, L, C), pooled ones (B, P); found {shapes[0]} and {shapes[1]}.")
    return Text(embeds, embeds.new_zeros(len(embeds), 0) if pooled is None else pooled)


class TinyText(nn.Module):
    """The embedded CLIP's text tower and the canvas: a linear map from its pooled vector to thumbnails of icons.

    The map is a ridge regression on training captions, before the transformer is trained (docs/tiny.md).
    """

    def __init__(self, clip: Clip, tokenizer: ClipTokenizer, *, tokens: int = 64, channels: int = 16):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer
        self.tokens, self.channels = tokens, channels
        self.canvas = nn.Linear(clip.text_projection.out_features, tokens * channels)

    def forward(self, prompts: Sequence[str]) -> Text:
        """Prompts -> states of all 24 tokens, pooled vector of unit variance and canvas, without gradients."""
        with torch.no_grad():
            warn_cut_tiny(self.tokenizer, prompts)
            ids = token_ids(self.tokenizer, list(prompts)).to(self.canvas.weight.device)
            states, embedding = embed_text(self.clip, ids)
            pooled = self.pooled(embedding)
            canvas = self.canvas(pooled.to(self.canvas.weight.dtype)).unflatten(-1, (self.tokens, self.channels))
        return Text(states, pooled, canvas)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The words of each prompt and their tokens."""
        return self.tokenizer.words(prompts)

    def pooled(self, embedding: Tensor) -> Tensor:
        """An embedding whose halves have unit length, scaled to about unit variance."""
        return embedding * (embedding.shape[-1] / 2) ** 0.5

    @torch.no_grad()
    def fit_canvas(self, pooled: Tensor, thumbnails: Tensor, *, ridge: float = 1e-2) -> None:
        """Fit the canvas by ridge regression of thumbnails (n, tokens * channels) on pooled vectors (n, P)."""
        mean_x, mean_y = pooled.mean(0), thumbnails.mean(0)
        x, y = (pooled - mean_x).double(), (thumbnails - mean_y).double()
        gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, x.T @ y / len(x)).T.float()
        self.canvas.weight.copy_(weight)
        self.canvas.bias.copy_(mean_y - weight @ mean_x)


class TinyTextStates(nn.Module):
    """The embedded CLIP's text tower for networks that read text by cross-attention only: token states and mask."""

    def __init__(self, clip: Clip, tokenizer: ClipTokenizer):
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Text:
        warn_cut_tiny(self.tokenizer, prompts)
        ids = token_ids(self.tokenizer, list(prompts)).to(self.clip.device)
        tokens = embed_text(self.clip, ids)[0]
        return Text(tokens, tokens.new_zeros(len(tokens), 0), mask=ids.ne(self.tokenizer.pad_token_id).long())

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The words of each prompt and their tokens."""
        return self.tokenizer.words(prompts)


class FluxText(nn.Module):
    """FLUX.1's two text encoders: T5's token states, at most `limit`, and CLIP's pooled vector."""

    def __init__(
        self,
        clip: CLIPTextModel,
        clip_tokenizer: PreTrainedTokenizerBase,
        t5: T5EncoderModel,
        t5_tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int = 512,
    ):
        super().__init__()
        self.clip, self.t5, self.limit = clip, t5, limit
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    __getstate__ = picklable_state

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], limit: int | None = None) -> Text:
        """limit: of T5's tokens, None: the model's. Raises ValueError for one that is not 1 to that of the model."""
        if limit is not None and not 1 <= limit <= self.limit:
            raise ValueError(f"max_sequence_length must be 1 to {self.limit}, T5's tokens of FLUX.1; found {limit}.")

        def ids(tokenizer: PreTrainedTokenizerBase, limit: int) -> Tensor:
            return tokenizer(
                list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )["input_ids"]

        warn_cut(self.t5_tokenizer, prompts, limit or self.limit)  # CLIP's pooled vector, of 77 tokens, is a summary
        pooled = self.clip(ids(self.clip_tokenizer, 77).to(self.clip.device)).pooler_output
        tokens = self.t5(ids(self.t5_tokenizer, limit or self.limit).to(self.t5.device))[0]
        return Text(tokens.to(pooled.device), pooled)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The words of each prompt and their T5 tokens."""
        return words_of(self.t5_tokenizer, prompts, self.limit)


class T5Text(nn.Module):
    """PixArt's text encoder: T5's token states and mask. Prompts are lower-cased and stripped, as in diffusers without
    cleaning of captions."""

    def __init__(self, t5: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, limit: int):
        super().__init__()
        self.t5, self.tokenizer, self.limit = t5, tokenizer, limit

    __getstate__ = picklable_state

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Text:
        read = {"padding": "max_length", "max_length": self.limit, "truncation": True, "return_tensors": "pt"}
        warn_cut(self.tokenizer, prompts, self.limit)
        batch = self.tokenizer([p.lower().strip() for p in prompts], **read).to(self.t5.device)
        tokens = self.t5(batch.input_ids, attention_mask=batch.attention_mask)[0]
        return Text(tokens, tokens.new_zeros(len(tokens), 0), mask=batch.attention_mask)

    def words(self, prompts: Sequence[str]) -> list[Words]:
        """The words of each prompt and their tokens."""
        return words_of(self.tokenizer, [p.lower().strip() for p in prompts], self.limit)


class ClipText(nn.Module):
    """Stable Diffusion's text encoder: the states of one CLIP text tower (SD 1.x and 2.x), or of SDXL's two side by
    side, with the pooled vector of the last.

    penultimate: the states before the last layer, without the final norm, and a pooled vector (SDXL); else the last
    states after the final norm, without a pooled vector.
    """

    def __init__(
        self,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        encoders: Sequence[nn.Module],
        *,
        penultimate: bool,
    ):
        super().__init__()
        self.tokenizers, self.encoders, self.penultimate = list(tokenizers), nn.ModuleList(encoders), penultimate

    __getstate__ = picklable_state

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], clip_skip: int | None = None) -> Text:
        """Prompts -> states of all tokens, truncated and padded to the tower's length. clip_skip: the number of last
        layers to leave out. Parts in brackets may have weights (`encoders/prompt_weights.py`)."""
        weighted = [i for i, prompt in enumerate(prompts) if has_weights(prompt)]
        if weighted:
            return self.weighted(prompts, weighted, clip_skip or 0)
        states, pooled = [], None
        encoders = cast("Sequence[CLIPTextModel | CLIPTextModelWithProjection]", self.encoders)
        for tokenizer, encoder in zip(self.tokenizers, encoders, strict=True):
            read = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            batch = tokenizer(list(prompts), return_tensors="pt", **read).to(encoder.device)
            warn_cut(tokenizer, prompts, tokenizer.model_max_length)
            mask = batch.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
            out = encoder(batch.input_ids, attention_mask=mask, output_hidden_states=True)
            hidden = out.hidden_states[-1 - (clip_skip or 0) - self.penultimate]
            if self.penultimate:
                states.append(hidden)
            else:
                tower = cast("CLIPTextModel", getattr(encoder, "text_model", encoder))  # flat in transformers 5
                states.append(out.last_hidden_state if not clip_skip else tower.final_layer_norm(hidden))
            if self.penultimate and "text_embeds" in out:
                pooled = out.text_embeds
        tokens = torch.cat(states, -1)
        return Text(tokens, tokens.new_zeros(len(tokens), 0) if pooled is None else pooled)

    def weighted(self, prompts: Sequence[str], which: Sequence[int], clip_skip: int) -> Text:
        """Prompts, of which some have weights; the pooled vector is that of the words without weights."""
        if clip_skip > 1 - self.penultimate:
            raise ValueError(f"Prompt weights support clip_skip up to {1 - self.penultimate}; found {clip_skip}.")
        text = self([plain_prompt(prompt) for prompt in prompts], clip_skip or None)
        tokens, how = text.tokens.clone(), {"penultimate": self.penultimate or bool(clip_skip)}
        for i in which:
            towers = zip(self.tokenizers, self.encoders, strict=True)
            states = [weighted_states(*tower, prompts[i], normed=not self.penultimate, **how) for tower in towers]
            tokens[i] = torch.cat(states, -1)[0].to(tokens)
        return replace(text, tokens=tokens)


def join_texts(texts: Sequence[Text]) -> Text:
    """Texts with the same number of tokens as one batch."""
    if len(texts) == 1:
        return texts[0]

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        return None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])

    tokens, pooled = torch.cat([t.tokens for t in texts]), torch.cat([t.pooled for t in texts])
    return Text(tokens, pooled, joined([t.canvas for t in texts]), joined([t.mask for t in texts]))
