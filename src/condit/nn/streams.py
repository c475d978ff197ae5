"""Streams: tokens that share one clock, one position grid and one LoRA (OminiControl, arXiv:2411.15098, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from condit.nn.lora import LowRank

Sees = Literal["self", "main", "all"]
Order = Literal["scale-first", "official-inference"]


@dataclass(frozen=True)
class Stream:
    """One branch of a joint sequence.

    tokens (B, N, C); ids (N, 3) or (B, N, 3), kept in float32; timestep (B,) in [0, 1], 0 = clean; guidance (B,);
    pooled (B, P). `sees`: what its queries attend to: only itself ("self", a cache is then exact), text, image and
    itself ("main", the official default), or every stream ("all"). `log_weight` is log of the strength: 0-d, or
    (B or 1, N) for each token of the noisy image; see `row_weights`. `memory`: where a pass leaves the stream's keys
    (after norm and rotation) and values by site path.
    """

    tokens: Tensor
    ids: Tensor
    timestep: Tensor
    pooled: Tensor
    guidance: Tensor | None = None
    lora: LowRank | None = None
    sees: Sees = "all"
    log_weight: Tensor | None = None
    weight_text: bool = True  # the strength also acts between condition and text (official code) or not (paper, Eq. 5)
    memory: dict[str, tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Group:
    """Adjacent streams that share one softmax call: rows attend to cols; weights[j] adds to the scores of cols[j]."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    weights: tuple[Tensor | None, ...]


def row_weights(log_weight: Tensor, length: int, image: slice, *, weight_text: bool = True) -> Tensor:
    """The log weight of each of `length` main rows, (B or 1, length), of which `image` are the noisy image's.

    Text has no place in the picture: it takes the mean weight of the image's tokens, or 0 without `weight_text`.
    """
    count = image.stop - image.start
    if log_weight.ndim == 0:
        text = log_weight[None, None]
        inside = text.expand(-1, count)
    else:
        text, inside = log_weight.exp().mean(-1, keepdim=True).log(), log_weight[:, :count]
    text = text if weight_text else torch.zeros_like(text)
    return torch.cat([text.expand(-1, image.start), inside, text.expand(-1, length - image.stop)], 1)


def grid_ids(
    height: int,
    width: int,
    *,
    delta: tuple[float, float] = (0, 0),
    scale: float = 1.0,
    order: Order = "scale-first",
) -> Tensor:
    """Positions (H W, 3) of a token grid, row-major, axis 0 always 0. id' = scale * id + (scale - 1) / 2 + delta.

    `delta` is in tokens of the image, applied after `scale` (the trainer's order; OminiControl, section 3.2.2).
    "official-inference": id' = scale * (id + delta) + (scale - 1) / 2, so that delta counts in tokens of the condition.
    """
    if order not in ("scale-first", "official-inference"):
        raise ValueError(f"order must be 'scale-first' or 'official-inference'; found {order!r}.")
    unit = scale if order == "official-inference" else 1
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    ids[..., 1:] = scale * ids[..., 1:] + (scale - 1) / 2
    ids[..., 1] += unit * delta[0]
    ids[..., 2] += unit * delta[1]
    return ids.flatten(0, 1)


def groups(
    text: int | None, image: int | None, streams: Sequence[Stream | None], *, apart: bool = False
) -> list[Group]:
    """Who attends to whom. `text` and `image` are the indices of the main streams (None where absent).

    The strength of a condition acts both ways: on its keys for the main rows, and on the main keys for its own rows.
    `apart` keeps conditions out of the main rows' call, so that keys which a control appends there stay unseen by them.
    """
    main = [i for i in (text, image) if i is not None]
    found: list[Group] = []
    for i, stream in enumerate(streams):
        cols, weights = [], []
        for j, other in enumerate(streams):
            if i in main or i == j:
                visible = True
            elif stream is None or stream.sees == "self":
                visible = False
            else:
                visible = stream.sees == "all" or j in main
            if not visible:
                continue
            cols.append(j)
            condition = other if i in main else stream
            crosses = (i in main) != (j in main)
            between_text = text is not None and text in (i, j)
            weighted = crosses and condition is not None and (condition.weight_text or not between_text)
            weights.append(condition.log_weight if weighted and condition is not None else None)
        last = found[-1] if found else None
        same = last and last.cols == tuple(cols) and all(a is b for a, b in zip(last.weights, weights, strict=True))
        if last and same and not (apart and (i in main) != (last.rows[-1] in main)):
            found[-1] = Group((*last.rows, i), last.cols, last.weights)
        else:
            found.append(Group((i,), tuple(cols), tuple(weights)))
    return found
