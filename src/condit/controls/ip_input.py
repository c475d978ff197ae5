"""References of an IP-Adapter as a call names them: features, masks, strengths, and the combination of references."""

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
    layers, if the backbone does not say; combine: the default for R references; form: where the branch is added;
    feature: what the projector reads."""

    features: int
    tokens: int = 4
    dim: int = 256
    heads: int = 4
    combine: Combine = "mean"
    form: Form = "joint"
    feature: Feature = "embeds"


@dataclass(frozen=True)
class ReferenceInputs:
    """References of a call: n groups of R images, or embeds= instead; identity= (n, E) or (n, R, E) of faces;
    content= to subtract; shortcut= of FaceID-Plus v2."""

    groups: list[list] | None
    embeds: Tensor | None = None
    identity: Tensor | None = None
    content: Tensor | None = None
    shortcut: float | None = None


def read_features(
    inputs: ReferenceInputs, config: IPConfig, name: str, read: Callable[[list], Tensor], like: Tensor, face: int
) -> Features:
    """The features of n images with R references each, (n, R, ...), as `like`. read(group) -> those of R images; face:
    width of a face's vector. Raises ValueError for missing inputs and for those of another kind of adapter."""
    groups, embeds, identity, content = inputs.groups, inputs.embeds, inputs.identity, inputs.content
    reads = config.feature
    if inputs.shortcut is not None and reads != "identity+hidden":
        raise ValueError(f"shortcut= is for FaceID-Plus v2; {name} does not support it. Leave it out.")
    features = None if embeds is None or reads == "identity" else external_features(embeds, config, name).to(like)
    if groups is not None and embeds is not None:
        raise ValueError("Give a reference image or embeds=, not both.")
    if groups is not None:
        features = torch.stack([read(group) for group in groups]).to(like)
    if content is not None:
        if reads != "embeds" or features is None:
            raise ValueError(
                f"{name} reads {reads} features, from which words cannot be subtracted: "
                "words share a space with CLIP's pooled image embedding only. Use a global adapter."
            )
        taken = content.to(like).reshape(-1, 1, content.shape[-1])
        if len(taken) not in (1, len(features)):
            raise ValueError(f"content for {len(taken)} images, references for {len(features)}. Give one, or as many.")
        features = features - taken
    if reads in ("identity", "identity+hidden"):
        if identity is None:
            raise ValueError(f"{name} is a FaceID adapter: give identity= (n, E), the face's vector.")
        if identity.ndim not in (2, 3) or identity.shape[-1] != face:
            raise ValueError(f"identity must be (n, {face}) or (n, R, {face}); found {tuple(identity.shape)}.")
        faces = (identity[:, None] if identity.ndim == 2 else identity).to(like)
        if reads == "identity":
            return faces
        if features is None:
            raise ValueError(f"{name} is a FaceID-Plus adapter: give the reference image too.")
        return faces, features
    if identity is not None:
        raise ValueError(f"{name} does not support identity=, which is for FaceID.")
    if features is None:
        raise ValueError("Give a reference image, or embeds=.")
    return features


def external_features(embeds: Tensor, config: IPConfig, name: str) -> Tensor:
    """Features (n, ...) or (n, R, ...) as (n, R, ...). Raises ValueError for features of another encoder."""
    states = config.feature in ("hidden", "identity+hidden")
    one, width = 3 if states else 2, config.features
    if embeds.ndim not in (one, one + 1) or embeds.shape[-1] != width:
        length = "L, " if states else ""
        raise ValueError(
            f"embeds must be (n, {length}{width}) or (n, R, {length}{width}), as the image encoder of "
            f"{name} gives them; found {tuple(embeds.shape)}."
        )
    return embeds[:, None] if embeds.ndim == one else embeds


def reference_masks(
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
    """Raises ValueError for a prefix that matches no layer, such as a misspelt one."""
    for prefix in strength if isinstance(strength, Mapping) else ():
        if not any(prefix == "" or path == prefix or path.startswith(f"{prefix}.") for path in paths):
            raise ValueError(
                f"strength names {prefix!r}, which matches no layer. An example of a layer is {paths[0]!r}."
            )


# R references of one image


def grouped(reference: References, what: str = "references") -> list[list]:
    """One reference, n of them, or n lists of R -> n lists of R. Raises ValueError for lists of different lengths."""
    outer = list(reference) if isinstance(reference, list | tuple) else [reference]
    groups = [list(r) if isinstance(r, list | tuple) else [r] for r in outer]
    if len({len(g) for g in groups}) != 1 or not groups[0]:
        raise ValueError(f"Every image needs the same number of {what}; found {[len(g) for g in groups]}.")
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
        factors = [1.0] * count if weights is None else list(weights)
        return [(each(features, lambda x, r=r: x[:, r]), w) for r, w in enumerate(factors)]
    if how == "subtract" and count < 2:
        raise ValueError(
            "combine='subtract' subtracts the others from the first reference: give at least two for each image."
        )

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
    """Weights of R references over the tokens of V' (B, H, R T, D), ordered by reference."""
    return torch.tensor(weights).to(v).repeat_interleave(v.shape[2] // len(weights))[:, None]


def times(
    strength: float | Sequence[float] | Mapping[str, float], weight: float
) -> float | Mapping[str, float] | Tensor:
    """The strength of one of R references: a number, numbers by prefix, or (n,). Raises ValueError for other values."""
    if isinstance(strength, Mapping):
        return {path: float(numbers(value)) * weight for path, value in strength.items()}
    values = numbers(strength)
    return float(cast("float", strength)) * weight if values.ndim == 0 else values * weight


def numbers(strength: object) -> Tensor:
    """A strength as a 0-d tensor, or (n,), one for each image."""
    try:
        values = torch.as_tensor(strength, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.ndim > 1 or not values.numel() or not values.isfinite().all():
        raise ValueError(
            "strength must be a finite number, one for each image, or numbers by prefix of the layers' paths; found "
            f"{strength!r}."
        )
    return values
