"""What a call gives an IP-Adapter, checked and read: references as features, masks, strengths by prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from condit.controls.ip_combine import Features
from condit.data.images import load_masks
from condit.encoders.image import Fit

if TYPE_CHECKING:
    from condit.controls.ip_adapter import IPAdapter


def given_features(
    adapter: IPAdapter,
    groups: list[list] | None,
    embeds: Tensor | None,
    identity: Tensor | None,
    content: Tensor | None,
    shortcut: float | None,
    fit: Fit,
) -> Features:
    """The features of n images with R references each, (n, R, ...), in the adapter's dtype. ValueError for what is
    missing, or is for another kind of adapter."""
    like, reads, name = next(adapter.parameters()), adapter.config.feature, adapter.name or "this adapter"
    if shortcut is not None and reads != "identity+hidden":
        raise ValueError(f"shortcut= is of FaceID-Plus v2; {name} is none. Leave it out.")
    pictures = None if embeds is None or reads == "identity" else made_elsewhere(adapter, embeds).to(like)
    if groups is not None and embeds is not None:
        raise ValueError("Give a reference picture or embeds=, its features; found both.")
    if groups is not None:
        pictures = torch.stack([adapter.features(group, fit) for group in groups]).to(like)
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
        width = adapter.image_proj.proj[0].in_features  # type: ignore[union-attr,index]
        if identity.ndim not in (2, 3) or identity.shape[-1] != width:
            raise ValueError(f"identity must be (n, {width}) or (n, R, {width}); found {tuple(identity.shape)}.")
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


def made_elsewhere(adapter: IPAdapter, embeds: Tensor) -> Tensor:
    """Features (n, ...) or (n, R, ...) as (n, R, ...). ValueError for those of another encoder."""
    states = adapter.config.feature in ("hidden", "identity+hidden")
    one, width = 3 if states else 2, adapter.config.features
    if embeds.ndim not in (one, one + 1) or embeds.shape[-1] != width:
        several = "L, " if states else ""
        raise ValueError(
            f"embeds must be (n, {several}{width}) or (n, R, {several}{width}), as the image encoder of "
            f"{adapter.name or 'this adapter'} gives them; found {tuple(embeds.shape)}."
        )
    return embeds[:, None] if embeds.ndim == one else embeds


def given_masks(adapter: IPAdapter, mask: Any, count: int) -> list[Tensor | None]:
    """A mask (n or 1, H, W) in [0, 1] for each of `count` references of an image."""
    if mask is None:
        return [None] * count
    device = adapter._bound().device
    if count == 1 or not isinstance(mask, list | tuple):
        return [load_masks(mask).to(device)] * count
    if len(mask) != count:
        raise ValueError(f"{len(mask)} masks for {count} references of an image. Give one, or one of each.")
    return [None if m is None else load_masks(m).to(device) for m in mask]


def check_prefixes(adapter: IPAdapter, strength: object) -> None:
    """ValueError for a prefix that names no layer: misspelt, it would act nowhere."""
    paths = [layer.path for layer in (*adapter.layers, *adapter.absent)]
    for prefix in strength if isinstance(strength, Mapping) else ():
        if not any(prefix == "" or path == prefix or path.startswith(f"{prefix}.") for path in paths):
            raise ValueError(f"strength names {prefix!r}, where no layer is. The layers are such as {paths[0]!r}.")
