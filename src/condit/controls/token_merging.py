"""Patches merging of DiT4Edit (Feng et al. 2024, arXiv:2411.03286, section 4.3): similar tokens of an image are merged
before a layer and unmerged after it. The matching is token merging for Stable Diffusion (Bolya & Hoffman 2023,
arXiv:2303.17604) with the first corner of every 2 x 2 cell as destination.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from condit.controls.control import Control, PromptPair, Run, Step, When, Where
from condit.nn.attention import Site

MINIMUM_TOKENS = 1024  # below it, matching costs as much as merging saves


@dataclass(frozen=True)
class Matching:
    """The merging of N tokens into M: token i goes to row rows[b, i]; counts (B, M, 1) are the tokens of each row, and
    picks[b, m] is its destination. Tokens before the last N of a sequence (text) are unchanged."""

    rows: Tensor
    picks: Tensor
    counts: Tensor
    mlp: bool = False

    def parts(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        extra = x.shape[-2] - length
        return x[..., :extra, :], x[..., extra:, :]

    def merge(self, x: Tensor) -> Tensor:
        """(B, ..., N, C) -> (B, ..., M, C): means. A single row, which broadcasts, is unchanged."""
        if x.shape[-2] == 1:
            return x
        before, x = self.parts(x, self.rows.shape[1])
        count = self.picks.shape[1]
        batch = max(len(x), len(self.rows))
        x = x.expand(batch, *x.shape[1:])
        shape = *x.shape[:-2], count, x.shape[-1]
        summed = x.new_zeros(shape).scatter_add(-2, place(self.rows, x), x)
        merged = summed / place_counts(self.counts, x)
        return merged if before.shape[-2] == 0 else torch.cat([before.expand(batch, *before.shape[1:]), merged], -2)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, ..., M, C) -> (B, ..., N, C): a row's value for each of its tokens."""
        before, x = self.parts(x, self.picks.shape[1])
        wide = x.gather(-2, place(self.rows, x))
        return wide if before.shape[-2] == 0 else torch.cat([before, wide], -2)

    def pick(self, x: Tensor) -> Tensor:
        """(N, C) or (B, 1, N, C) -> (B, 1, M, C): the value of the token that the others go to."""
        before, x = self.parts(x if x.ndim == 4 else x[None, None], self.rows.shape[1])
        batch = len(self.picks)
        x = x.expand(batch, *x.shape[1:])
        chosen = x.gather(-2, place(self.picks, x))
        return chosen if before.shape[-2] == 0 else torch.cat([before.expand(batch, *before.shape[1:]), chosen], -2)


def place(index: Tensor, x: Tensor) -> Tensor:
    """(B, K) -> (B, ..., K, C) as gather and scatter along -2 of x (B, ..., N, C) need it."""
    index = index.reshape(len(index), *[1] * (x.ndim - 3), index.shape[1], 1)
    return index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1])


def place_counts(counts: Tensor, x: Tensor) -> Tensor:
    return counts.reshape(len(counts), *[1] * (x.ndim - 3), *counts.shape[1:]).to(x.dtype)


Order = tuple[Tensor, Tensor]


def corner_order(grid: tuple[int, int], cell: tuple[int, int] = (2, 2)) -> Order:
    """Numbers of the sources and of the destinations: the first corner of every whole cell.

    Rows and columns that fill no cell are all sources. Their order is that of tomesd's sort
    (tomesd/merge.py, argsort of -1 and 0); it only decides ties of similarity.
    """
    rows, columns = grid
    whole = rows // cell[0] * cell[0], columns // cell[1] * cell[1]
    marks = torch.zeros(rows, columns, dtype=torch.int64)
    marks[: whole[0] : cell[0], : whole[1] : cell[1]] = -1
    order = marks.reshape(1, -1, 1).argsort(dim=1)[0, :, 0]
    count = (rows // cell[0]) * (columns // cell[1])
    return order[count:], order[:count]


def match(metric: Tensor, order: Order, ratio: float) -> Matching:
    """Bipartite soft matching: the int(ratio N) sources most similar (cosine) to a destination join it.

    metric (B, N, C), row-major over the grid of `corner_order`. Rows afterwards: the other sources, most similar first,
    then destinations.
    """
    n, (source, destination) = metric.shape[1], order
    count = min(int(n * ratio), len(source))
    unit = metric / metric.norm(dim=-1, keepdim=True)
    nearest, at = (unit[:, source] @ unit[:, destination].mT).max(-1)
    edge = nearest.argsort(dim=-1, descending=True, stable=True)
    joining, staying = edge[:, :count], edge[:, count:]
    batch, kept = len(metric), len(source) - count
    ends = torch.arange(kept, kept + len(destination), device=metric.device).expand(batch, -1)
    rows = torch.empty(batch, n, dtype=torch.long, device=metric.device)
    rows = rows.scatter(1, source[staying], torch.arange(kept, device=metric.device).expand(batch, -1))
    rows = rows.scatter(1, source[joining], kept + at.gather(1, joining))
    rows = rows.scatter(1, destination.expand(batch, -1), ends)
    picks = torch.cat([source[staying], destination.expand(batch, -1)], 1)
    counts = torch.zeros_like(picks).scatter_add(1, rows, torch.ones_like(rows))
    return Matching(rows, picks, counts[..., None])


@dataclass(frozen=True)
class TokenMerging(Control):
    """Self-attention, and with `mlp` the MLP, on 1 - ratio of the image's tokens.

    ratio: in [0, 0.75], as three of four tokens of a cell are sources; 0 is plain, bit for bit. `when.curve` is a
    factor on it by step; a new number of tokens recompiles. every: steps that one match serves. minimum: images with
    fewer tokens are not merged. In an edit the target uses the source's match; both sides of guidance share it.
    """

    ratio: float = 0.5
    mlp: bool = False
    where: Where = field(default_factory=Where)
    when: When = field(default_factory=When)
    every: int = 1
    minimum: int = MINIMUM_TOKENS
    # Of a run:
    grid: tuple[int, int] | None = None
    order: Order | None = None
    paths: frozenset[str] | None = None  # of the sites that `where` names; None: all
    paired: bool = False
    memory: dict[tuple[str, float], Matching] = field(default_factory=dict)
    follows: bool = False  # takes the match that the conditional side of guidance has made in this step
    fresh: bool = True

    def __post_init__(self):
        if not 0 <= self.ratio <= 0.75:
            raise ValueError(f"ratio must lie in [0, 0.75]: one token in four stays; found {self.ratio}.")
        if self.every < 1:
            raise ValueError(f"every counts the steps of a match, at least 1; found {self.every}.")

    def edit(self, pair: PromptPair, backbone: nn.Module) -> TokenMerging:
        return self

    def differs(self) -> bool:
        return False

    def prepare(self, run: Run) -> TokenMerging:
        if run.cells is not None:
            raise ValueError(
                "TokenMerging needs the whole grid of tokens; this call generates a part (fill). Leave one out."
            )
        if run.backbone is not None and not getattr(run.backbone, "merges", False):
            raise ValueError(
                f"TokenMerging needs blocks that merge: those of DiT, PixArt and MM-DiTs ('tiny', FLUX.1); found "
                f"{type(run.backbone).__name__}. Leave it out."
            )
        memory = run.memory.setdefault("TokenMerging", {})
        sites = getattr(run.backbone, "sites", ())  # matched once: a compiled forward cannot match patterns
        paths = None if self.where == Where() else frozenset(s.path for s in sites if s in self.where)
        source, destination = (x.to(run.pooled.device) for x in corner_order(run.grid))
        return replace(
            self, grid=run.grid, order=(source, destination), paths=paths, paired=run.edit is not None, memory=memory
        )

    def at(self, step: Step) -> TokenMerging | None:
        ratio = self.ratio * self.when.factor(step)
        if self.grid is None:
            raise ValueError("TokenMerging acts in a pipeline call, or after prepare(run): its grid is not known yet.")
        n = self.grid[0] * self.grid[1]
        if int(n * ratio) == 0 or n < self.minimum:
            return None
        first = step.index % self.every == 0 or not self.memory
        return replace(self, ratio=ratio, fresh=first and not self.follows)

    def merging(self, site: Site, tokens: Tensor, image: slice) -> Matching | None:
        if self.grid is None or self.order is None or site.kind == "cross":
            return None
        if self.paths is not None and site.path not in self.paths:
            return None
        if image.stop - image.start != self.grid[0] * self.grid[1]:
            return None
        key = site.path, self.ratio
        if not self.fresh and key in self.memory:
            return self.memory[key]
        metric = tokens[:, image]
        if not self.paired:
            matching = match(metric, self.order, self.ratio)
        else:
            matching = match(metric[0::2], self.order, self.ratio)
            rows, picks, counts = (x.repeat_interleave(2, 0) for x in (matching.rows, matching.picks, matching.counts))
            matching = Matching(rows, picks, counts)
        self.memory[key] = matching = replace(matching, mlp=self.mlp)
        return matching

    def negative(self) -> TokenMerging:
        return replace(self, follows=True)

    def describe(self) -> dict:
        settings = {"ratio": self.ratio, "mlp": self.mlp, "every": self.every, "minimum": self.minimum}
        return {
            "method": "TokenMerging",
            **settings,
            "when": [self.when.start, self.when.end],
            "where": list(self.where.patterns),
        }
