"""What a call gives an IP-Adapter: references as features, masks, strengths; and how several references become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from condit.data.images import ImageSource, load_masks

# One image, n for n images of a call, or n lists of R.
References = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]
Combine = Literal["mean", "concat", "add", "subtract", "sum"]
Form = Literal["joint", "cross", "residual"]
Feature = Literal["embeds", "hidden", "identity", "identity+hidden"]
# What a projector reads: (B, E), or (B, L, H), or of a face both.
Features = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class IPConfig:
    """features: width of the image encoder's output; tokens: image tokens T; dim: width of the tokens; heads: of the
    layers, where a backbone does not say; combine: of several references, by default; form: where the branch is added;
    feature: what is read."""

    features: int
    tokens: int = 4
    dim: int = 256
    heads: int = 4
    combine: Combine = "mean"
    form: Form = "joint"
    feature: Feature = "embeds"


@dataclass(frozen=True)
class Given:
    """References of a call: n groups of R images, or embeds= in their place; identity= (n, E) or (n, R, E) of faces;
    content= to subtract; shortcut= of FaceID-Plus v2."""

    groups: list[list] | None
    embeds: Tensor | None = None
    identity: Tensor | None = None
    content: Tensor | None = None
    shortcut: float | None = None


def given_features(
    given: Given, config: IPConfig, name: str, read: Callable[[list], Tensor], like: Tensor, face: int
) -> Features:
    """The features of n images with R references each, (n, R, ...), as `like`. read(group) -> those of R images; face:
    width of a face's vector. ValueError for what is missing, or is for another kind of adapter."""
    groups, embeds, identity, content, reads = given.groups, given.embeds, given.identity, given.content, config.feature
    if given.shortcut is not None and reads != "identity+hidden":
        raise ValueError(f"shortcut= is of FaceID-Plus v2; {name} is none. Leave it out.")
    pictures = None if embeds is None or reads == "identity" else made_elsewhere(embeds, config, name).to(like)
    if groups is not None and embeds is not None:
        raise ValueError("Give a reference picture or embeds=, its features; found both.")
    if groups is not None:
        pictures = torch.stack([read(group) for group in groups]).to(like)
    if content is not None:
        if reads != "embeds" or pictures is None:
            raise ValueError(
                f"{name} reads {reads} features, from which no words can be subtracted: "
                "words share a space with CLIP's pooled image embedding only. Use a global adapter."
            )
        taken = content.to(like).reshape(-1, 1, content.shape[-1])
        if len(taken) not in (1, len(pictures)):
            raise ValueError(f"content for {len(taken)} images, references for {len(pictures)}. Give one, or as many.")
        pictures = pictures - taken
    if reads in ("identity", "identity+hidden"):
        if identity is None:
            raise ValueError(f"{name} is FaceID: give identity= (n, E), a face's vector.")
        if identity.ndim not in (2, 3) or identity.shape[-1] != face:
            raise ValueError(f"identity must be (n, {face}) or (n, R, {face}); found {tuple(identity.shape)}.")
        faces = (identity[:, None] if identity.ndim == 2 else identity).to(like)
        if reads == "identity":
            return faces
        if pictures is None:
            raise ValueError(f"{name} is FaceID-Plus: give the reference picture too.")
        return faces, pictures
    if identity is not None:
        raise ValueError(f"{name} reads no identity=; it is no FaceID.")
    if pictures is None:
        raise ValueError("Give a reference picture, or embeds=.")
    return pictures


def made_elsewhere(embeds: Tensor, config: IPConfig, name: str) -> Tensor:
    """Features (n, ...) or (n, R, ...) as (n, R, ...). ValueError for those of another encoder."""
    states = config.feature in ("hidden", "identity+hidden")
    one, width = 3 if states else 2, config.features
    if embeds.ndim not in (one, one + 1) or embeds.shape[-1] != width:
        several = "L, " if states else ""
        raise ValueError(
            f"embeds must be (n, {several}{width}) or (n, R, {several}{width}), as the image encoder of "
            f"{name} gives them; found {tuple(embeds.shape)}."
        )
    return embeds[:, None] if embeds.ndim == one else embeds


def given_masks(
    mask: ImageSource | Sequence[ImageSource | None] | None, count: int, device: torch.device
) -> list[Tensor | None]:
    """A mask (n or 1, H, W) in [0, 1] for each of `count` references of an image."""
    if mask is None:
        return [None] * count
    if count == 1 or not isinstance(mask, list | tuple):
        return [load_masks(cast("ImageSource", mask)).to(device)] * count
    if len(mask) != count:
        raise ValueError(f"{len(mask)} masks for {count} references of an image. Give one, or one of each.")
    return [None if m is None else load_masks(m).to(device) for m in mask]


def check_prefixes(strength: object, paths: Sequence[str]) -> None:
    """ValueError for a prefix that names no layer: misspelt, it would act nowhere."""
    for prefix in strength if isinstance(strength, Mapping) else ():
        if not any(prefix == "" or path == prefix or path.startswith(f"{prefix}.") for path in paths):
            raise ValueError(f"strength names {prefix!r}, where no layer is. The layers are such as {paths[0]!r}.")


# Several references of one image


def grouped(reference: References, what: str = "references") -> list[list]:
    """One reference, n of them, or n lists of R: n lists of R. ValueError for lists of different lengths."""
    outer = list(reference) if isinstance(reference, list | tuple) else [reference]
    groups = [list(r) if isinstance(r, list | tuple) else [r] for r in outer]
    if len({len(g) for g in groups}) != 1 or not groups[0]:
        raise ValueError(f"Every image needs equally many {what}; found {[len(g) for g in groups]}.")
    return groups


def combined(features: Features, how: Combine, weights: Sequence[float] | None = None) -> list[tuple[Features, float]]:
    """Features (n, R, ...) -> those of each attention, and its weight. "concat" keeps (n, R, ...)."""
    count = (features[0] if isinstance(features, tuple) else features).shape[1]
    if weights is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} references of an image.")
    if weights is not None and how == "mean" and abs(sum(weights)) < 1e-8:
        raise ValueError(f"combine='mean' divides by the sum of weights, which is 0: {list(weights)}.")
    if how == "concat":
        return [(features, 1.0)]
    if how == "sum":
        given = [1.0] * count if weights is None else list(weights)
        return [(each(features, lambda x, r=r: x[:, r]), w) for r, w in enumerate(given)]
    if how == "subtract" and count < 2:
        raise ValueError("combine='subtract' takes the others from the first reference: give two or more an image.")

    def one(x: Tensor) -> Tensor:
        if weights is not None:
            x = x * torch.tensor(weights).to(x).reshape(1, -1, *[1] * (x.ndim - 2))
        if how == "add":
            return x.sum(1)
        if how == "subtract":
            return x[:, 0] - x[:, 1:].mean(1)
        return x.mean(1) if weights is None else x.sum(1) / sum(weights)

    return [(each(features, one), 1.0)]


def each(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    if isinstance(features, tuple):
        return change(features[0]), change(features[1])
    return change(features)


def zeros_of(features: Features) -> Features:
    """No reference: one row of zeros."""
    return each(features, lambda x: torch.zeros_like(x[:1]))


def each_token(weights: Sequence[float], v: Tensor) -> Tensor:
    """Weights of R references over the tokens of V' (B, H, R T, D), which stand reference by reference."""
    return torch.tensor(weights).to(v).repeat_interleave(v.shape[2] // len(weights))[:, None]


def times(
    strength: float | Sequence[float] | Mapping[str, float], weight: float
) -> float | Mapping[str, float] | Tensor:
    """The strength of one reference of several: a number, numbers by prefix, or (n,). ValueError for what is none."""
    if isinstance(strength, Mapping):
        return {path: float(numbers(value)) * weight for path, value in strength.items()}
    values = numbers(strength)
    return float(cast("float", strength)) * weight if values.ndim == 0 else values * weight


def numbers(strength: object) -> Tensor:
    """A strength as a tensor of no dimension, or one an image."""
    try:
        values = torch.as_tensor(strength, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.ndim > 1 or not values.numel() or not values.isfinite().all():
        raise ValueError(
            "strength must be a finite number, one an image, or numbers by prefix of the layers' paths; found "
            f"{strength!r}."
        )
    return values
