"""IP-Adapter in a run: K', V' of a reference and how strongly, where and when they act (arXiv:2308.06721, Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from condit.controls.control import (
    Act,
    Control,
    MaskMode,
    Run,
    Step,
    When,
    Where,
    check_layers,
    check_shape,
    match_batch,
    region_levels,
    region_mask,
)
from condit.controls.ip_input import IPConfig
from condit.controls.wrap import Wrapper
from condit.nn.attention import Attend, Call, Reduction, Site, join_heads, sdpa
from condit.nn.lora import LowRank, PartialLoRA, sum_loras

KeyValues = Mapping[str, tuple[Tensor, Tensor]]  # site path -> K', V', each (B, H, T, D)
Strength = float | Mapping[str, float] | Tensor
# How the strength acts, in ComfyUI's words: on the branch's output, or inside the attention.
Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]


class Adapter(Protocol):
    """The adapter of a reference."""

    config: IPConfig
    name: str
    hash: str


@dataclass(frozen=True)
class IPReference(Control):
    """K', V' of a reference at every site; `empty` are those of no reference.

    strength: lambda; by prefix of the site's path, 0 elsewhere; or (n,), one an image. `weight`
    (0-d, by path, or (B, 1, 1, 1)) and `area` are set for a run, the latter the mask on the token grid: (B, 1, N, 1),
    or by N where N differs by level.
    """

    kv: KeyValues
    empty: KeyValues
    adapter: Adapter
    strength: Strength
    where: Where
    when: When = field(default_factory=When)
    mask: Tensor | None = None
    source: list[dict] = field(default_factory=list)
    scaling: Scaling = "V only"
    mask_mode: MaskMode = "area"
    weight: Tensor | Mapping[str, Tensor] | None = None
    area: Tensor | Mapping[int, Tensor] | None = None

    def prepare(self, run: Run) -> IPReference:
        check_layers(run, self.kv)
        kv = {
            # A control made before the pipeline was moved or cast acts where the pipeline computes now.
            path: (
                match_batch(k.to(run.pooled), run.batch, "IPAdapter"),
                match_batch(v.to(run.pooled), run.batch, "IPAdapter"),
            )
            for path, (k, v) in self.kv.items()
            if any_site(self.where, path)
        }
        strength = self.strength
        if isinstance(strength, Tensor):
            here = match_batch(strength, run.batch, "strength").reshape(-1, 1, 1, 1).to(run.pooled.device)
            strength = here if strength.any() else 0.0
        return replace(self, kv=kv, strength=strength, area=self.area_of(run))

    def area_of(self, run: Run) -> Tensor | Mapping[int, Tensor] | None:
        """The mask on the token grid, or on the grid of each level of a UNet."""
        if self.mask is None:
            return None
        if self.adapter.config.form == "cross":
            levels = region_levels(self.mask, run.grid, self.mask_mode)
            return {n: match_batch(area, run.batch, "mask") for n, area in levels.items()}
        check_shape(self.mask, run.grid)
        return match_batch(region_mask(self.mask, run.grid, run.cells, self.mask_mode), run.batch, "mask")

    def at(self, step: Step) -> IPReference | None:
        factor = self.when.factor(step)
        if isinstance(self.strength, Tensor):
            return None if factor == 0 else replace(self, weight=self.strength * factor)
        device = next((k.device for k, _ in self.kv.values()), None)  # made there: a copy would wait for it
        if isinstance(self.strength, Mapping):
            each = {path: strength_at(self.strength, path) * factor for path in self.kv}
            if not any(each.values()):
                return None
            return replace(self, weight={p: torch.full((), float(w), device=device) for p, w in each.items()})
        weight = self.strength * factor
        return None if weight == 0 else replace(self, weight=torch.full((), float(weight), device=device))

    def around(self, call: Call, attend: Attend) -> Tensor:
        return self.added(call, attend(call))

    def added(self, call: Call, out: Tensor) -> Tensor:
        """out + lambda softmax(q K'^T / sqrt(d)) V' on the rows of the noisy image (Eq. 5)."""
        if self.adapter.config.form == "residual" or call.image is None or call.plain is None:
            return out
        if call.site.path not in self.kv:
            return out
        rows = call.image
        side = self.side(call.plain[:, :, rows], call.site, call.merged)
        if (rows.start, rows.stop) == (0, out.shape[2]):
            return out + side
        return torch.cat([out[:, :, : rows.start], out[:, :, rows] + side, out[:, :, rows.stop :]], 2)

    def side(self, q: Tensor, site: Site, merged: Reduction | None = None) -> Tensor:
        """The attention to the reference alone, times strength and area; q (B, H, N, D) of the image."""
        k, v = self.kv[site.path]
        weight = self.weight[site.path] if isinstance(self.weight, Mapping) else self.weight
        if weight is not None and self.scaling != "V only":
            k, v = scaled(k, v, weight.to(k), self.scaling)
            weight = None
        side = sdpa(Call(q, k, v, site))
        if weight is not None:
            side = side * weight.to(side)
        area = self.area[q.shape[2]] if isinstance(self.area, Mapping) else self.area
        if area is not None and merged is not None and area.shape[2] > 1:
            area = merged.merge(area)
        return side if area is None else side * area.to(side)

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        """XLabs' form for FLUX: added after a double block, ungated and without an output projection."""
        if self.adapter.config.form != "residual" or site.path not in self.kv:
            return None
        return join_heads(self.side(query, site))

    def within(self, area: Tensor) -> IPReference:
        """The same, weighted by `area`, which broadcasts to (B, H, N, D): 0 = off, 1 = full strength."""
        return replace(self, area=area)

    def negative(self) -> IPReference:
        return replace(self, kv=self.empty)

    def describe(self) -> dict:
        strength = self.strength
        if isinstance(strength, Tensor | Mapping):
            strength = strength.tolist() if isinstance(strength, Tensor) else dict(strength)
        return {
            "method": "IPAdapter",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "strength": strength,
            "when": [self.when.start, self.when.end],
            "where": list(self.where.patterns),
            "reference": self.source,
        }


@dataclass(frozen=True)
class WithLoRA(Wrapper):
    """FaceID: references and the LoRA of their file, which acts on both sides of guidance, as a merged LoRA does."""

    adapter: Adapter
    update: LowRank | None

    @property
    def acts(self) -> frozenset[Act]:
        return super().acts | frozenset[Act](("adapt",))

    def lora(self) -> LowRank | None:
        return sum_loras((self.update, super().lora()))

    def describe(self) -> dict:
        scale = (
            float(self.update.weight)
            if isinstance(self.update, PartialLoRA) and self.update.weight is not None
            else 1.0
        )
        return {**self.inside[0].describe(), "lora_scale": scale}


def scaled(k: Tensor, v: Tensor, weight: Tensor, how: Scaling) -> tuple[Tensor, Tensor]:
    """K', V' with the strength inside the attention (ComfyUI_IPAdapter_plus, "embeds_scaling"). The penalty is the
    layer's width over 1280, SDXL's widest."""
    if how.endswith("w/ C penalty"):
        weight = weight * (k.shape[1] * k.shape[3] / 1280)
    if how.startswith("K+V"):
        return k * weight, v * weight
    mean = v.mean(2, keepdim=True)
    return k * weight, v - mean + mean * weight


def strength_at(strengths: Mapping[str, float], path: str) -> float:
    """The strength of the longest prefix, of whole path parts, that the path has; 0 for a path that has none."""
    prefixes = [p for p in strengths if p == "" or path == p or path.startswith(p + ".")]
    return strengths[max(prefixes, key=len)] if prefixes else 0.0


def any_site(where: Where, path: str) -> bool:
    return Site(path, "joint", 0) in where
