"""IP-Adapter in a run: K', V' of a reference and how strongly they act, where and when (arXiv:2308.06721, Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from condit.controls.control import (
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
from condit.nn.attention import Attend, Call, Reduction, Site, join_heads, sdpa
from condit.nn.lora import LowRank, PartialLoRA

if TYPE_CHECKING:
    from condit.controls.ip_adapter import IPAdapter

KeyValues = Mapping[str, tuple[Tensor, Tensor]]  # site path -> K', V', each (B, H, T, D)
Strength = float | Mapping[str, float] | Tensor
# How the strength acts, in ComfyUI's words: on the branch's output, or inside the attention.
Scaling = Literal["V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"]


@dataclass(frozen=True)
class IPReference(Control):
    """K', V' of a reference at every site; `empty` are those of no reference.

    strength: lambda; by prefix of the site's path, where what is not named is off; or (n,), one an image. `weight`
    (0-d, by path, or (B, 1, 1, 1)) and `region` are set for a run: (B, 1, N, 1), or by N where N differs by level.
    """

    kv: KeyValues
    empty: KeyValues
    adapter: IPAdapter
    strength: Strength
    where: Where
    when: When = field(default_factory=When)
    mask: Tensor | None = None
    source: list[dict] = field(default_factory=list)
    scaling: Scaling = "V only"
    mask_mode: MaskMode = "area"
    weight: Tensor | Mapping[str, Tensor] | None = None
    region: Tensor | Mapping[int, Tensor] | None = None

    def prepare(self, run: Run) -> IPReference:
        check_layers(run, self.kv)
        kv = {
            path: (match_batch(k, run.batch, "IPAdapter"), match_batch(v, run.batch, "IPAdapter"))
            for path, (k, v) in self.kv.items()
            if any_site(self.where, path)
        }
        strength = self.strength
        if isinstance(strength, Tensor):
            strength = match_batch(strength, run.batch, "strength").reshape(-1, 1, 1, 1)
        return replace(self, kv=kv, strength=strength, region=self.region_of(run))

    def region_of(self, run: Run) -> Tensor | Mapping[int, Tensor] | None:
        """The mask on the token grid, or on the grid of each level of a UNet."""
        if self.mask is None:
            return None
        if self.adapter.config.form == "cross":
            levels = region_levels(self.mask, run.grid, self.mask_mode)
            return {n: match_batch(region, run.batch, "mask") for n, region in levels.items()}
        check_shape(self.mask, run.grid)
        return match_batch(region_mask(self.mask, run.grid, run.cells, self.mask_mode), run.batch, "mask")

    def at(self, step: Step) -> IPReference | None:
        factor = self.when.factor(step)
        if isinstance(self.strength, Tensor):
            weight = self.strength * factor
            return replace(self, weight=weight) if bool(weight.any()) else None
        if isinstance(self.strength, Mapping):
            each = {path: strength_at(self.strength, path) * factor for path in self.kv}
            return replace(self, weight={p: torch.tensor(w) for p, w in each.items()}) if any(each.values()) else None
        weight = self.strength * factor
        return None if weight == 0 else replace(self, weight=torch.tensor(weight))

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
        """The attention to the reference alone, times strength and region; q (B, H, N, D) of the image."""
        k, v = self.kv[site.path]
        weight = self.weight[site.path] if isinstance(self.weight, Mapping) else self.weight
        if weight is not None and self.scaling != "V only":
            k, v = scaled(k, v, weight.to(k), self.scaling)
            weight = None
        side = sdpa(Call(q, k, v, site))
        if weight is not None:
            side = side * weight.to(side)
        region = self.region[q.shape[2]] if isinstance(self.region, Mapping) else self.region
        if region is not None and merged is not None and region.shape[2] > 1:
            region = merged.merge(region)
        return side if region is None else side * region.to(side)

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        """XLabs' form for FLUX: added behind a double block, ungated and without an output projection."""
        if self.adapter.config.form != "residual" or site.path not in self.kv:
            return None
        return join_heads(self.side(query, site))

    def inside(self, region: Tensor) -> IPReference:
        """Acting by `region`, which broadcasts to (B, H, N, D): 0 = not at all, 1 = at full strength."""
        return replace(self, region=region)

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
class Together(Control):
    """Several references as one control: what each adds is added up."""

    parts: tuple[IPReference, ...]

    @property
    def adapter(self) -> IPAdapter:
        return self.parts[0].adapter

    def prepare(self, run: Run) -> Together:
        return replace(self, parts=tuple(part.prepare(run) for part in self.parts))

    def at(self, step: Step) -> Together | None:
        parts = tuple(p for p in (part.at(step) for part in self.parts) if p is not None)
        return replace(self, parts=parts) if parts else None

    def around(self, call: Call, attend: Attend) -> Tensor:
        out = attend(call)
        for part in self.parts:
            out = part.added(call, out)
        return out

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        total = None
        for part in self.parts:
            found = part.residual(site, query)
            if found is not None:
                total = found if total is None else total + found
        return total

    def negative(self) -> Together:
        return replace(self, parts=tuple(part.negative() for part in self.parts))

    def describe(self) -> dict:
        return {**self.parts[0].describe(), "together": [part.describe() for part in self.parts]}


@dataclass(frozen=True)
class WithLoRA(Control):
    """FaceID: a reference beside the LoRA of its file, which acts on both sides of guidance, as if merged."""

    inner: Control
    adapter: IPAdapter
    update: LowRank | None

    def prepare(self, run: Run) -> WithLoRA:
        return replace(self, inner=self.inner.prepare(run))

    def at(self, step: Step) -> WithLoRA | None:
        inner = self.inner.at(step)
        return None if inner is None else replace(self, inner=inner)

    def around(self, call: Call, attend: Attend) -> Tensor:
        return self.inner.around(call, attend)

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        return self.inner.residual(site, query)

    def lora(self) -> LowRank | None:
        return self.update

    def negative(self) -> WithLoRA:
        inner = self.inner.negative()
        return self if inner is None else replace(self, inner=inner)

    def describe(self) -> dict:
        scale = (
            float(self.update.weight)
            if isinstance(self.update, PartialLoRA) and self.update.weight is not None
            else 1.0
        )
        return {**self.inner.describe(), "lora_scale": scale}


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
    found = [p for p in strengths if p == "" or path == p or path.startswith(p + ".")]
    return strengths[max(found, key=len)] if found else 0.0


def any_site(where: Where, path: str) -> bool:
    return Site(path, "joint", 0) in where
