"""What an OminiControl trainer reads: pairs as pictures, then as rows of tokens, encoded at need or kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from condit.controls.omini_tasks import OminiConfig, Side
from condit.data.images import load_image, to_tensor
from condit.data.pairs import Pair, Pairs, fingerprint, open_pairs
from condit.data.subjects200k import REPOSITORY, open_subjects200k
from condit.drawing.references import ANNOTATORS
from condit.encoders.text import Text
from condit.encoders.vae import pack
from condit.weights.files import read_tensors, save_tensors


@dataclass(frozen=True)
class ConditionSpec:
    """One condition of every pair, a table of `[[data.conditions]]`.

    role: the references it takes, or "target" for the target itself; annotator: what is made of that picture. size:
    (height, width), None: the target's. delta in image tokens, or a side. adapter: conditions of one name share a LoRA.
    """

    role: str
    annotator: str | None = None
    delta: tuple[float, float] | Side = (0, 0)
    scale: float = 1.0
    size: tuple[int, int] | None = None
    adapter: str = "omini"

    def __post_init__(self):
        if self.annotator is not None and self.annotator not in ANNOTATORS:
            raise ValueError(f"no annotator {self.annotator!r}; there are {', '.join(ANNOTATORS)}.")

    def config(self, *, independent: bool, rank: int, alpha: float | None) -> OminiConfig:
        return OminiConfig(self.role, self.delta, self.scale, independent, self.annotator, rank=rank, alpha=alpha)


def read_specs(given: Sequence[dict[str, Any]]) -> tuple[ConditionSpec, ...]:
    """The tables of a recipe. TypeError for an unknown field, as for any argument."""
    if not given:
        raise ValueError("conditions must hold at least one table, as [[data.conditions]] with role = 'subject'.")
    tables: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()} for t in given]
    return tuple(ConditionSpec(**table) for table in tables)


@dataclass
class Pictures:
    """Targets (B, 3, H, W) with captions, and of each condition the pictures (B, 3, h, w), all in [-1, 1]. drawn (B,
    rows, columns): which cells are drawn, for token integration."""

    images: Tensor
    captions: list[str]
    conditions: tuple[Tensor, ...]
    drawn: Tensor | None = None


@dataclass
class Rows:
    """The same encoded: posteriors as packed, scaled mean and deviation (B, 2, N, C); text (B, L, C), pooled (B, P)."""

    target: Tensor
    conditions: tuple[Tensor, ...]
    text: Tensor
    pooled: Tensor
    drawn: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)


def draw_posterior(moments: Tensor, generator: torch.Generator | None) -> Tensor:
    """Tokens (B, N, C) from (B, 2, N, C): a sample, as the official trainer takes; without a generator the mode."""
    if generator is None:
        return moments[:, 0]
    noise = torch.randn(moments[:, 0].shape, generator=generator).to(moments)
    return moments[:, 0] + moments[:, 1] * noise


@torch.no_grad()
def moments_of(vae: Any, images: Tensor) -> Tensor:
    """Mean and deviation of the posterior, packed and scaled, (B, 2, N, C); no deviation where the encoder is exact."""
    posterior = vae.encode(images.to(next(vae.parameters()).dtype)).latent_dist
    mean = pack((posterior.mode() - vae.config.shift_factor) * vae.config.scaling_factor)
    std = pack(posterior.std * vae.config.scaling_factor) if hasattr(posterior, "std") else torch.zeros_like(mean)
    return torch.stack([mean, std], 1)


def open_training_pairs(source: str) -> tuple[Pairs, str]:
    """A set of pairs, and a name under which what is computed from it may be kept. Subjects200K by its repository's
    name, or a folder of its parquet files."""
    folder = Path(source)
    if source == REPOSITORY or (folder.is_dir() and any(folder.rglob("*.parquet"))):
        pairs = open_subjects200k(source)
        return pairs, f"subjects200k-{len(pairs)}"
    return open_pairs(folder), fingerprint(folder)


def check_roles(pairs: Pairs, specs: Sequence[ConditionSpec], source: str) -> None:
    """ValueError if the first pair lacks a role; later ones are told when they are read."""
    if not len(pairs):
        raise ValueError(f"{source} holds no pair.")
    first = pairs[0]
    for spec in specs:
        if spec.role != "target" and not first.references.get(spec.role):
            has = ", ".join(first.references) or "no references"
            raise ValueError(
                f"{source}: the condition {spec.role!r} needs references of that role; the first pair has {has}. "
                "role = 'target' with an annotator makes a condition from the target."
            )


def read_pair(pair: Pair, specs: Sequence[ConditionSpec], size: tuple[int, int]) -> tuple[Tensor, str, list[Tensor]]:
    """Target, caption and conditions as pixels. The middle of each picture is taken: what was aligned stays so."""
    target = fitted(pair.image, size)
    conditions = []
    for spec in specs:
        at = spec.size or size
        picture = fitted(target if spec.role == "target" else pair.one(spec.role), at)
        picture = picture if spec.annotator is None else ANNOTATORS[spec.annotator](picture)
        conditions.append(to_tensor(picture, at))
    return to_tensor(target, size), pair.text, conditions


def fitted(source: Any, size: tuple[int, int]) -> Image.Image:
    picture, wanted = load_image(source), (size[1], size[0])
    return picture if picture.size == wanted else ImageOps.fit(picture, wanted, Image.Resampling.LANCZOS)


# Rows on disk


def cache_key(set_key: str, model: str, specs: Sequence[ConditionSpec], size: tuple[int, int], text_tokens: int) -> str:
    """Another folder for other pairs, another model, or other ways to read them."""
    said = [set_key, model, [asdict(s) for s in specs], size, text_tokens]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def save_row(file: Path, rows: Rows, i: int) -> None:
    tensors = {"target": rows.target[i], "text": rows.text[i], "pooled": rows.pooled[i]}
    save_tensors(file, tensors | {f"condition.{k}": c[i] for k, c in enumerate(rows.conditions)})


def load_rows(files: Sequence[Path]) -> Rows:
    found = [read_tensors(file) for file in files]

    def stack(name: str) -> Tensor:
        return torch.stack([row[name] for row in found])

    count = sum(name.startswith("condition.") for name in found[0])
    conditions = tuple(stack(f"condition.{k}") for k in range(count))
    return Rows(stack("target"), conditions, stack("text"), stack("pooled"))


def with_empty(rows: Rows, empty: Rows, no_text: Tensor, no_picture: Tensor) -> Rows:
    """The rows of `no_text` (B,) with the empty prompt, those of `no_picture` with black conditions: all of a pair's
    conditions together, as the official trainer drops them."""

    def mixed(which: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
        return torch.where(which.to(kept.device).view(-1, *[1] * (kept.ndim - 1)), gone.to(kept), kept)

    conditions = tuple(mixed(no_picture, e, c) for e, c in zip(empty.conditions, rows.conditions, strict=True))
    text, pooled = mixed(no_text, empty.text, rows.text), mixed(no_text, empty.pooled, rows.pooled)
    return Rows(rows.target, conditions, text, pooled, rows.drawn)


def text_of(found: Text, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return found.tokens.to(dtype), found.pooled.to(dtype)
