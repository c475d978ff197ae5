"""Data of OminiControl's training: pairs as images, then as rows of tokens, encoded on demand or cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image, ImageOps
from pydantic import Field, field_validator
from torch import Tensor, nn

from condit.controls.omini_tasks import OminiConfig, Side
from condit.data.images import ImageSource, load_image, to_tensor
from condit.data.pairs import Pair, Pairs, fingerprint, open_pairs
from condit.data.subjects200k import REPOSITORY, open_subjects200k
from condit.drawing.references import ANNOTATORS
from condit.encoders.text import Text
from condit.encoders.vae import pack, scale_shift
from condit.training.denoising import posterior_of
from condit.training.fields import Count, Data, Number, Probability, Whole
from condit.weights.files import read_tensors, save_tensors
from condit.weights.quantise import Quantise

DELTA_LIMIT = 4096  # tokens; the positions of the largest images end far below
RANK_LIMIT = 4096

Shift = Annotated[Number, Field(ge=-DELTA_LIMIT, le=DELTA_LIMIT)]


class ConditionSpec(Data):
    """One condition of every pair, a table of `[[data.conditions]]`.

    role: the role of the references, or "target" for the target itself. annotator: what makes the condition of that
    image. size: (height, width) in pixels, None: the target's. delta: in image tokens, or a side. adapter: conditions
    with the same name share a LoRA; the name is also that of its folder in the export.
    """

    role: str
    annotator: str | None = None
    delta: tuple[Shift, Shift] | Side = (0, 0)
    scale: Annotated[Number, Field(gt=0, le=DELTA_LIMIT)] = 1.0
    size: tuple[Count, Count] | None = None
    adapter: str = "omini"

    @field_validator("annotator")
    @classmethod
    def _known(cls, annotator: str | None) -> str | None:
        if annotator is not None and annotator not in ANNOTATORS:
            raise ValueError(f"no annotator {annotator!r}; expected one of {', '.join(ANNOTATORS)}.")
        return annotator

    @field_validator("adapter")
    @classmethod
    def _folder(cls, adapter: str) -> str:
        # A dot would also break the name of the module.
        if not adapter or adapter != adapter.strip() or any(sign in adapter for sign in "./\\:\0"):
            raise ValueError(f"adapter must be the name of a folder without dots or slashes; found {adapter!r}.")
        return adapter

    def config(self, *, independent: bool, rank: int, alpha: float | None) -> OminiConfig:
        return OminiConfig(self.role, self.delta, self.scale, independent, self.annotator, rank=rank, alpha=alpha)


class OminiData(Data):
    """model: a folder or file of FLUX.1. pairs: see condit.data.pairs, or Subjects200K.

    height, width: of the targets, in pixels. independent: conditions attend to themselves only, so that a cache is
    exact. integrate: token integration with one condition, the target itself. text_tokens: length of T5's text. cache:
    a folder of encoded rows; the text encoders then leave memory. held_out: the number of pairs for validation. draw:
    how many of them are generated at each validation, in `draw_steps` steps, to measure whether they follow their
    conditions. quantize: the frozen transformer's blocks. components: the folder of what a single file lacks.
    """

    model: str
    pairs: str
    conditions: tuple[ConditionSpec, ...]
    height: Count = 512
    width: Count = 512
    rank: Annotated[int, Field(ge=1, le=RANK_LIMIT)] = 4
    alpha: Annotated[Number, Field(gt=0)] | None = None
    independent: bool = False
    integrate: bool = False
    text_dropout: Probability = 0.1
    image_dropout: Probability = 0.1
    text_tokens: Count = 512
    cache: str | None = None
    held_out: Whole = 16
    draw: Whole = 4
    draw_steps: Count = 8
    checkpointing: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Quantise | None = None
    components: str | None = None

    @field_validator("conditions")
    @classmethod
    def _some(cls, conditions: tuple[ConditionSpec, ...]) -> tuple[ConditionSpec, ...]:
        if not conditions:
            raise ValueError("conditions must hold at least one table, as [[data.conditions]] with role = 'subject'.")
        return conditions


@dataclass
class PairImages:
    """Targets (B, 3, H, W) with captions, and the images (B, 3, h, w) of each condition, all in [-1, 1]. drawn (B,
    rows, columns): the cells that the model generates, for token integration."""

    images: Tensor
    captions: list[str]
    conditions: tuple[Tensor, ...]
    drawn: Tensor | None = None


@dataclass
class Rows:
    """Encoded pairs: packed, scaled mean and deviation of posteriors (B, 2, N, C); text (B, L, C), pooled (B, P)."""

    target: Tensor
    conditions: tuple[Tensor, ...]
    text: Tensor
    pooled: Tensor
    drawn: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)


def sample_posterior(moments: Tensor, generator: torch.Generator | None) -> Tensor:
    """Tokens (B, N, C) from (B, 2, N, C): a sample, as in the official trainer; without a generator the mode."""
    if generator is None:
        return moments[:, 0]
    noise = torch.randn(moments[:, 0].shape, generator=generator).to(moments)
    return moments[:, 0] + moments[:, 1] * noise


@torch.no_grad()
def moments_of(vae: nn.Module, images: Tensor) -> Tensor:
    """Mean and deviation of the posterior, packed and scaled, (B, 2, N, C); zero deviation of a deterministic
    encoder."""
    scale, shift = scale_shift(vae)
    z, std = posterior_of(vae, images.to(next(vae.parameters()).dtype))
    mean = pack((z - shift) * scale)
    return torch.stack([mean, torch.zeros_like(mean) if std is None else pack(std * scale)], 1)


def open_training_pairs(source: str) -> tuple[Pairs, str]:
    """The pairs, and a key for caches of what is computed from them. Subjects200K is opened by its repository's name,
    or from a folder of its parquet files."""
    folder = Path(source)
    if source == REPOSITORY or (folder.is_dir() and any(folder.rglob("*.parquet"))):
        pairs = open_subjects200k(source)
        return pairs, f"subjects200k-{len(pairs)}"
    return open_pairs(folder), fingerprint(folder)


def check_roles(pairs: Pairs, specs: Sequence[ConditionSpec], source: str) -> None:
    """Raises ValueError if the first pair lacks a role; later pairs are checked when they are read."""
    if not len(pairs):
        raise ValueError(f"{source} holds no pairs.")
    first = pairs[0]
    for spec in specs:
        if spec.role != "target" and not first.references.get(spec.role):
            roles = ", ".join(first.references) or "no references"
            raise ValueError(
                f"{source}: the condition {spec.role!r} needs references of that role; the first pair has {roles}. "
                "Use role = 'target' with an annotator to make a condition from the target."
            )


def read_pair(pair: Pair, specs: Sequence[ConditionSpec], size: tuple[int, int]) -> tuple[Tensor, str, list[Tensor]]:
    """Target, caption and conditions as pixels. Images are centre-cropped, so that aligned ones stay aligned."""
    target = fitted(pair.image, size)
    conditions = []
    for spec in specs:
        at = spec.size or size
        image = fitted(target if spec.role == "target" else pair.one(spec.role), at)
        image = image if spec.annotator is None else ANNOTATORS[spec.annotator](image)
        conditions.append(to_tensor(image, at))
    return to_tensor(target, size), pair.text, conditions


def fitted(source: ImageSource, size: tuple[int, int]) -> Image.Image:
    image, width_height = load_image(source), (size[1], size[0])
    return image if image.size == width_height else ImageOps.fit(image, width_height, Image.Resampling.LANCZOS)


# Rows on disk


def cache_key(set_key: str, model: str, specs: Sequence[ConditionSpec], size: tuple[int, int], text_tokens: int) -> str:
    """The name of a cache's folder: a hash of the pairs, the model and the settings that rows depend on."""
    settings = [set_key, model, [s.model_dump() for s in specs], size, text_tokens]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def save_row(file: Path, rows: Rows, i: int) -> None:
    tensors = {"target": rows.target[i], "text": rows.text[i], "pooled": rows.pooled[i]}
    save_tensors(file, tensors | {f"condition.{k}": c[i] for k, c in enumerate(rows.conditions)})


def load_rows(files: Sequence[Path]) -> Rows:
    tensors = [read_tensors(file) for file in files]

    def stack(name: str) -> Tensor:
        return torch.stack([row[name] for row in tensors])

    count = sum(name.startswith("condition.") for name in tensors[0])
    conditions = tuple(stack(f"condition.{k}") for k in range(count))
    return Rows(stack("target"), conditions, stack("text"), stack("pooled"))


def with_empty(rows: Rows, empty: Rows, no_text: Tensor, no_image: Tensor) -> Rows:
    """Replaces the text by the empty prompt where `no_text` (B,), and the conditions by black ones where `no_image`:
    all conditions of a pair together, as in the official trainer."""

    def mixed(dropped: Tensor, replacement: Tensor, kept: Tensor) -> Tensor:
        return torch.where(dropped.to(kept.device).view(-1, *[1] * (kept.ndim - 1)), replacement.to(kept), kept)

    conditions = tuple(mixed(no_image, e, c) for e, c in zip(empty.conditions, rows.conditions, strict=True))
    text, pooled = mixed(no_text, empty.text, rows.text), mixed(no_text, empty.pooled, rows.pooled)
    return Rows(rows.target, conditions, text, pooled, rows.drawn)


def text_of(text: Text, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return text.tokens.to(dtype), text.pooled.to(dtype)
