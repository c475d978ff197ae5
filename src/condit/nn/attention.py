"""The one attention call, and the controls that may wrap it (docs/architecture.md, section 1)."""

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
    """Where an attention layer stands in its backbone. `path` is the module path in the published names."""

    path: str
    kind: Literal["self", "cross", "joint"]
    index: int  # ordinal among the sites of the same kind


class Reduction(Protocol):
    """A layer on fewer tokens: `merge` before it, `unmerge` behind it, along dimension -2; `pick` takes of each group
    one token's value, e.g. its position. `mlp`: whether the MLP runs on fewer tokens too."""

    mlp: bool

    def merge(self, x: Tensor) -> Tensor: ...

    def unmerge(self, x: Tensor) -> Tensor: ...

    def pick(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Call:
    """One attention call: q (B, H, Nq, D), k and v (B, H, Nk, D); bias broadcasts to (B, H, Nq, Nk), in the log domain.

    `image` marks the rows of q that belong to the noisy image: an empty slice where the text attends apart from it,
    None where a condition attends on its own. `plain` are the same queries before rotary positions, for side branches
    without positions. `keys` are the columns of k that belong to the noisy image; before them stand the text's, from 0
    to `keys.start`, and behind them those of conditions. `merged`: how rows stand for tokens, where tokens were merged.
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
        """More keys in the same softmax; `log_weight`, 0-d or one a query (B or 1, 1, Nq, 1), adds to their scores."""
        bias = self.bias
        if bias is not None or log_weight is not None:
            left = bias if bias is not None else self.q.new_zeros(1, 1, 1, self.k.shape[2])
            right = left.new_zeros(1) if log_weight is None else log_weight.to(left)
            rows = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
            bias = torch.cat([left.expand(*rows, -1), right.expand(*rows, k.shape[2])], dim=-1)
        return replace(self, k=torch.cat([self.k, k], 2), v=torch.cat([self.v, v], 2), bias=bias)


class Attend(Protocol):
    """What a control receives to run the rest of the chain."""

    def __call__(self, call: Call) -> Tensor: ...


class Around(Protocol):
    """The part of a control that `attend` needs."""

    def around(self, call: Call, attend: Attend) -> Tensor: ...


class Merging(Protocol):
    """The part of a control that `reduction` needs."""

    def merging(self, site: Site, tokens: Tensor, image: slice) -> Reduction | None: ...


def sdpa(call: Call) -> Tensor:
    """Scaled dot-product attention, (B, H, Nq, D). With `edit_map` the probabilities pass through it."""
    # On CPUs the fused kernel's backward is slower than the plain form at the sequence lengths trained there.
    plain_backward = call.q.device.type == "cpu" and torch.is_grad_enabled() and call.v.requires_grad
    if call.edit_map is None and not plain_backward:
        return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.bias)
    scores = (call.q / math.sqrt(call.q.shape[-1])) @ call.k.transpose(-1, -2)
    if call.bias is not None:
        scores = scores + call.bias
    probabilities = scores.softmax(-1)
    return (probabilities if call.edit_map is None else call.edit_map(probabilities)) @ call.v


def attend(call: Call, controls: Sequence[Around] = (), last: Attend = sdpa) -> Tensor:
    """Run one attention call through its controls, the first of which is the outermost; `last` is inside them all."""
    run = last
    for control in reversed(controls):
        run = partial(control.around, attend=run)
    return run(call)


def reduction(site: Site, tokens: Tensor, image: slice, controls: Sequence[Merging]) -> Reduction | None:
    """How the first control that merges tokens would merge the input (B, N, C) of the layer at `site`; None: not."""
    for control in controls:
        found = control.merging(site, tokens, image)
        if found is not None:
            return found
    return None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)
