"""The one attention call and the protocols of the controls that act on it (docs/architecture.md, section 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """An attention layer of a backbone. `path` is its module path in the published names."""

    path: str
    kind: Literal["self", "cross", "joint"]
    index: int  # ordinal among the sites of the same kind


class Reduction(Protocol):
    """Runs a layer on fewer tokens: `merge` before the layer and `unmerge` after it, both along dimension -2. `pick`
    returns one token's value of each group, such as its position. `mlp`: whether the MLP runs on fewer tokens too."""

    mlp: bool

    def merge(self, x: Tensor) -> Tensor: ...

    def unmerge(self, x: Tensor) -> Tensor: ...

    def pick(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Call:
    """One attention call: q (B, H, Nq, D), k and v (B, H, Nk, D); bias broadcasts to (B, H, Nq, Nk), in the log domain.

    `image` are the rows of q that belong to the noisy image: an empty slice if only text attends, None if only a
    condition attends. `plain` are the same queries before rotary positions, for side branches without positions.
    `keys` are the columns of k that belong to the noisy image: the text's columns, 0 to `keys.start`, come first, those
    of conditions last. `merged` maps rows to tokens if tokens were merged.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    site: Site
    bias: Tensor | None = None
    edit_map: Callable[[Tensor], Tensor] | None = None
    image: slice | None = None
    plain: Tensor | None = None
    keys: slice | None = None
    merged: Reduction | None = None

    def append_kv(self, k: Tensor, v: Tensor, log_weight: Tensor | None = None) -> Call:
        """Add keys to the same softmax; `log_weight`, 0-d or one a query (B or 1, 1, Nq, 1), adds to their scores."""
        bias = self.bias
        if bias is not None or log_weight is not None:
            left = bias if bias is not None else self.q.new_zeros(1, 1, 1, self.k.shape[2])
            right = left.new_zeros(1) if log_weight is None else log_weight.to(left)
            rows = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
            bias = torch.cat([left.expand(*rows, -1), right.expand(*rows, k.shape[2])], dim=-1)
        return replace(self, k=torch.cat([self.k, k], 2), v=torch.cat([self.v, v], 2), bias=bias)


class Attend(Protocol):
    """The function that a control calls to run the rest of the chain."""

    def __call__(self, call: Call) -> Tensor: ...


class AttentionControl(Protocol):
    """The part of a control that `attend` needs."""

    def around(self, call: Call, attend: Attend) -> Tensor: ...


class MergingControl(Protocol):
    """The part of a control that `reduction` needs."""

    def merging(self, site: Site, tokens: Tensor, image: slice) -> Reduction | None: ...


class BlockControl(AttentionControl, MergingControl, Protocol):
    """The part of a control that the blocks of a backbone need."""

    def residual(self, site: Site, query: Tensor) -> Tensor | None: ...


def sdpa(call: Call) -> Tensor:
    """Scaled dot-product attention, (B, H, Nq, D). `edit_map`, if present, transforms the probabilities."""
    # On CPUs the fused kernel's backward is slower than the plain form at the sequence lengths trained there.
    plain_backward = call.q.device.type == "cpu" and torch.is_grad_enabled() and call.v.requires_grad
    if call.edit_map is None and not plain_backward:
        return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.bias)
    scores = (call.q / math.sqrt(call.q.shape[-1])) @ call.k.transpose(-1, -2)
    if call.bias is not None:
        scores = scores + call.bias
    probabilities = scores.softmax(-1)
    return (probabilities if call.edit_map is None else call.edit_map(probabilities)) @ call.v


def attend(call: Call, controls: Sequence[AttentionControl] = (), last: Attend = sdpa) -> Tensor:
    """Run one attention call through its controls, the first of which is the outermost; `last` is inside them all."""
    run = last
    for control in reversed(controls):
        run = partial(control.around, attend=run)
    return run(call)


def reduction(site: Site, tokens: Tensor, image: slice, controls: Sequence[MergingControl]) -> Reduction | None:
    """The reduction of the first control that merges tokens (B, N, C) at the input of `site`, None without one."""
    for control in controls:
        merged = control.merging(site, tokens, image)
        if merged is not None:
            return merged
    return None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)
