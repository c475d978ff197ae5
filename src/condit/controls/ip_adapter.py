"""IP-Adapter: text-compatible image prompts through decoupled attention (Ye et al. 2023, arXiv:2308.06721).

On an MM-DiT the image rows get a second attention, to keys and values made from the reference alone:
out = attend(call) + lambda * softmax(q K'^T / sqrt(d)) V' (Eq. 5), with q before rotary positions and K' normalised.

Beyond the paper, an adapter may also shift the prompt's pooled vector by lambda W f, f the image's feature. There a
style word acts too. The embedded model's adapter has it (docs/tiny.md); published files have no W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls.control import Control, Run, Step, When, Where, match_batch, region_mask
from condit.nn.attention import Attend, Call, Site, sdpa, split_heads

if TYPE_CHECKING:
    from condit.data.images import ImageSource

Combine = Literal["mean", "concat"]
POOLED = "pooled_proj.weight"


@dataclass(frozen=True)
class IPConfig:
    """features: width of the image encoder's output; tokens: image tokens T; dim: width of the tokens; pooled: width of
    the pooled vector that the adapter shifts, 0 if it does not."""

    features: int
    tokens: int = 4
    dim: int = 256
    heads: int = 4
    combine: Combine = "mean"
    pooled: int = 0


class ImageProjection(nn.Module):
    """Global projector: features (B, E) -> T tokens (B, T, C); the norm is per token (section 3.2.1)."""

    def __init__(self, config: IPConfig):
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.features, config.tokens * config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features).unflatten(-1, (self.tokens, -1)))


class KeyValue(nn.Module):
    """K' and V' of one site."""

    def __init__(self, config: IPConfig, width: int):
        super().__init__()
        self.to_k_ip = nn.Linear(config.dim, width, bias=False)
        self.to_v_ip = nn.Linear(config.dim, width, bias=False)


class IPAdapter(nn.Module):
    """An adapter: projector and one K', V' pair a site. Published: `image_proj.*`, `ip_adapter.N.to_k_ip.weight`."""

    def __init__(self, config: IPConfig, sites: Sequence[Site], width: int, pipe=None):
        super().__init__()
        self.config, self.name, self.hash = config, "", ""
        self.sites = tuple(s.path for s in sites)
        self.image_proj = ImageProjection(config)
        self.ip_adapter = nn.ModuleList(KeyValue(config, width) for _ in sites)
        self.pooled_proj = nn.Linear(config.features, config.pooled, bias=False) if config.pooled else None
        self._pipe = [pipe]  # in a list: the pipeline's weights are not ours
        if self.pooled_proj is not None:
            nn.init.zeros_(self.pooled_proj.weight)
        for pair in self.ip_adapter:
            nn.init.zeros_(pair.to_v_ip.weight)  # type: ignore[union-attr]  # step 0 of training is the base model

    @classmethod
    def load(cls, source, pipe) -> IPAdapter:
        """From a name ("tiny/style"), a file or a folder; sizes are read off the tensors."""
        file = pipe.adapter_file(source, "IPAdapter")
        for name in ("image_proj.proj.weight", "image_proj.norm.weight", "ip_adapter.0.to_k_ip.weight"):
            if name not in file.tensors:
                raise ValueError(f"{source}: no {name!r}. Expected an IP-Adapter for an MM-DiT; found {file.guess}.")
        rows, features = file.tensors["image_proj.proj.weight"].shape
        dim = len(file.tensors["image_proj.norm.weight"])
        width = file.tensors["ip_adapter.0.to_k_ip.weight"].shape[0]
        pairs, sites = sum(n.endswith(".to_k_ip.weight") for n in file.tensors), pipe.backbone.sites
        if (pairs, width) != (len(sites), pipe.backbone.config.dim):
            raise ValueError(
                f"{source} has {pairs} K', V' pairs of width {width}; {pipe.name} has {len(sites)} attention layers of "
                f"width {pipe.backbone.config.dim}. Was it made for another model?"
            )
        if pipe.image is None or pipe.image.features != features:
            found = "no image encoder" if pipe.image is None else f"an image encoder of width {pipe.image.features}"
            raise ValueError(f"{source} needs image features of width {features}; {pipe.name} has {found}.")
        heads = pipe.backbone.config.num_attention_heads
        pooled = len(file.tensors.get(POOLED, ()))
        if pooled not in (0, pipe.backbone.config.pooled_projection_dim):
            raise ValueError(
                f"{source} shifts a pooled vector of width {pooled}; that of {pipe.name} has "
                f"{pipe.backbone.config.pooled_projection_dim}. Was it made for another model?"
            )
        config = IPConfig(features, rows // dim, dim, heads, file.config.get("combine", "mean"), pooled)
        adapter = cls(config, sites, width, pipe)
        adapter.load_state_dict({k: v.float() for k, v in file.tensors.items()}, strict=True)
        adapter.name, adapter.hash = file.name, file.hash
        return adapter.requires_grad_(False).to(pipe.device, pipe.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in self.state_dict().items()}

    def metadata(self) -> dict:
        """What `load` needs beside the tensors."""
        return {"method": "IPAdapter", **asdict(self.config)}

    def keys_values(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Features (B, E), or (B, R, E) for R references concatenated, -> site path -> K', V', each (B, H, T, D)."""
        tokens = self.image_proj(features)
        if tokens.ndim == 4:
            tokens = tokens.flatten(1, 2)
        found = {}
        for path, pair in zip(self.sites, self.ip_adapter, strict=True):
            k = split_heads(pair.to_k_ip(tokens), self.config.heads)  # type: ignore[operator]
            v = split_heads(pair.to_v_ip(tokens), self.config.heads)  # type: ignore[operator]
            found[path] = (F.rms_norm(k, k.shape[-1:], eps=1e-5), v)
        return found

    def shift(self, features: Tensor) -> Tensor | None:
        """W f (B, P) for features (B, E), or (B, R, E), of which the mean counts; None for an adapter without W."""
        if self.pooled_proj is None:
            return None
        return self.pooled_proj(features if features.ndim == 2 else features.mean(1))

    def reference(self, features: Tensor, strength: float = 1.0, where: Where | None = None, **fields) -> IPReference:
        """A control from features (B, E), or (B, R, E) for R references side by side; zeros stand for no reference."""
        where = where or Where()
        return IPReference(
            kv=self.keys_values(features),
            empty=self.keys_values(torch.zeros_like(features[:1])),
            # The shift reaches every layer, so a control of some layers goes without.
            addition=self.shift(features) if where == Where() else None,
            adapter=self,
            strength=strength,
            where=where,
            **fields,
        )

    def control(
        self,
        reference: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]],
        *,
        strength: float = 1.0,
        where: Where | str | tuple[str, ...] | None = None,
        when: When | None = None,
        mask: ImageSource | None = None,
        combine: Combine | None = None,
    ) -> IPReference:
        """A control from one reference, from n references for n images, or from n lists of several references each.

        strength: lambda, any real number. Several references of one image are averaged as features ("mean") or stand
        side by side in one softmax ("concat"). mask: where in the picture it acts, white = acts. where: the attention
        layers at which it acts; the shift of the pooled vector reaches all of them, so with `where` it is left out.
        """
        pipe = self._pipe[0]
        if pipe is None:
            raise ValueError("This adapter is not bound to a pipeline. Use IPAdapter.load(name, pipe).")
        if combine not in (None, "mean", "concat"):
            raise ValueError(f"combine must be 'mean' or 'concat'; found {combine!r}.")
        groups = [r if isinstance(r, list | tuple) else [r] for r in as_list(reference)]
        if len({len(g) for g in groups}) != 1 or not groups[0]:
            raise ValueError(f"Every image needs equally many references; found {[len(g) for g in groups]}.")
        features = torch.stack([pipe.image(pipe.read_images(list(group), None)) for group in groups])  # (n, R, E)
        with torch.no_grad():
            given = features if (combine or self.config.combine) == "concat" else features.mean(1)
            return self.reference(
                given.to(pipe.dtype),
                strength,
                Where.of(where),
                when=when or When(),
                mask=None if mask is None else (pipe.read_images(mask, None)[:, 0] + 1) / 2,
                source=pipe.describe_source(reference),
            )


def as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True)
class IPReference(Control):
    """K', V' of a reference at every site; `empty` are those of zero features; `addition` (B, P) to the pooled vector.
    `weight` (0-d) and `region` are set for a run."""

    kv: dict[str, tuple[Tensor, Tensor]]
    empty: dict[str, tuple[Tensor, Tensor]]
    addition: Tensor | None
    adapter: IPAdapter
    strength: float
    where: Where
    when: When = field(default_factory=When)
    mask: Tensor | None = None
    source: list[dict] = field(default_factory=list)
    weight: Tensor | None = None
    region: Tensor | None = None

    def prepare(self, run: Run) -> IPReference:
        kv = {
            path: (match_batch(k, run.batch, "IPAdapter"), match_batch(v, run.batch, "IPAdapter"))
            for path, (k, v) in self.kv.items()
            if any_site(self.where, path)
        }
        region = (
            None if self.mask is None else match_batch(region_mask(self.mask, run.grid, run.cells), run.batch, "mask")
        )
        if region is not None and bool((region == region[:, :, :1]).all()):
            region = region[:, :, :1]  # the same for every token, so that one clock serves all of them
        addition = None if self.addition is None else match_batch(self.addition, run.batch, "IPAdapter")
        return replace(self, kv=kv, addition=addition, region=region)

    def at(self, step: Step) -> IPReference | None:
        weight = self.strength * self.when.factor(step)
        return None if weight == 0 else replace(self, weight=torch.tensor(weight))

    def around(self, call: Call, attend: Attend) -> Tensor:
        out = attend(call)
        if call.image is None or call.plain is None or call.site.path not in self.kv:
            return out
        rows = call.image
        k, v = self.kv[call.site.path]
        side = sdpa(Call(call.plain[:, :, rows], k, v, call.site))
        if self.weight is not None:
            side = side * self.weight.to(side)
        if self.region is not None:
            region = self.region if call.merged is None else call.merged.merge(self.region)
            side = side * region.to(side)
        return torch.cat([out[:, :, : rows.start], out[:, :, rows] + side, out[:, :, rows.stop :]], 2)

    def pooled(self) -> Tensor | None:
        if self.addition is None:
            return None
        addition = self.addition if self.weight is None else self.addition * self.weight.to(self.addition)
        if self.region is None:
            return addition
        each = addition[:, None] * self.region[:, 0].to(addition)  # (B, N, P), or (B, 1, P) if all tokens have one
        return each if each.shape[1] > 1 else each[:, 0]

    def inside(self, region: Tensor) -> IPReference:
        """Acting by `region`, which broadcasts to (B, H, N, D): 0 = not at all, 1 = at full strength."""
        return replace(self, region=region)

    def negative(self) -> IPReference:
        return replace(self, kv=self.empty, addition=None)

    def describe(self) -> dict:
        return {
            "method": "IPAdapter",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "strength": self.strength,
            "when": [self.when.start, self.when.end],
            "where": list(self.where.patterns),
            "reference": self.source,
        }


def any_site(where: Where, path: str) -> bool:
    return Site(path, "joint", 0) in where
