"""What a caption looks like: a coarse drawing from its words, by a small network that is fitted once and then stays.

A caption costs it a hundredth of what it costs the MM-DiT, so it knows concepts and styles within minutes; the MM-DiT
starts from its drawing, at every noise level, and learns what is left (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.encoders.clip_tokenizer import SPECIAL_TOKENS
from condit.training.optim import parameter_groups
from condit_lab.draw.muon import Muon


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Sketch(nn.Module):
    """Caption ids (B, L) -> codes (B, *shape): `components` principal components of whole drawings, weighed by a
    network of the sum of the words' vectors."""

    def __init__(self, vocabulary: int, *, width: int, depth: int, components: int, shape: tuple[int, int]):
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.blocks = nn.ModuleList([Residual(width) for _ in range(depth)])
        self.norm, self.weights = nn.LayerNorm(width), nn.Linear(width, components)
        nn.init.zeros_(self.weights.weight)
        self.basis: Tensor
        self.mean: Tensor
        self.register_buffer("basis", torch.zeros(components, math.prod(shape)))  # times their root mean square
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.requires_grad_(False)

    def components(self, ids: Tensor) -> Tensor:
        """In units of `basis`, (B, components)."""
        known = ids >= len(SPECIAL_TOKENS)
        x = (self.words(ids.long()) * known[..., None]).sum(1)
        for block in self.blocks:
            x = block(x)
        return self.weights(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.addmm(self.mean, self.components(ids), self.basis.to(self.mean)).unflatten(-1, self.shape)


def fit_basis(sketch: Sketch, codes: Tensor, weights: Tensor, *, sample: int = 12_000, seed: int = 0) -> Tensor:
    """Set mean and basis by a sample of the drawings; returns the components of all, (n, components).

    codes (n, *shape); weights (n,): how often each drawing is trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(weights.double(), min(sample, len(codes)), generator=generator)
    some = codes[rows].float().flatten(1)
    sketch.mean.copy_(some.mean(0))
    count = len(sketch.basis)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vectors = torch.svd_lowrank(some - sketch.mean, q=min(count + count // 4, *some.shape), niter=2)[2][:, :count]
    parts = codes.flatten(1).split(4096)
    components = torch.cat([(part.float() - sketch.mean) @ vectors for part in parts])
    unit = components[rows].square().mean().sqrt()
    sketch.basis[: vectors.shape[1]].copy_(unit * vectors.mT)
    return F.pad(components / unit, (0, count - vectors.shape[1]))


@torch.enable_grad()
def fit_sketch(
    sketch: Sketch,
    captions: Tensor,
    starts: Tensor,
    components: Tensor,
    weights: Tensor,
    *,
    epochs: float = 20.0,
    batch: int = 512,
    empty: float = 0.05,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Sequence[float]:
    """Fit the network by squared error; returns the mean loss of each tenth.

    captions (C, L) and starts (n + 1,) as of `caption_table`; components (n, components); weights (n,); empty: the
    share of captions without words, whose sketch is the mean; dtype of the products.
    """
    sketch.requires_grad_(True)
    matrices, embeddings, rest = parameter_groups(sketch)
    rates = {"muon": 0.01, "embedding": 3e-3, "rest": 1e-3}
    muon = Muon([{"params": matrices}], lr=rates["muon"], weight_decay=0.02, dtype=dtype)
    adam = torch.optim.AdamW(
        [{"params": embeddings, "lr": rates["embedding"]}, {"params": rest, "lr": rates["rest"]}],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    groups = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    generator, counts = torch.Generator().manual_seed(seed), starts.diff()
    steps = max(10, round(epochs * len(components) / batch))
    losses: list[float] = []
    for step in range(steps):
        for group, peak in groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        rows = torch.multinomial(weights.double(), batch, replacement=True, generator=generator)
        place = (torch.rand(batch, generator=generator, dtype=torch.float64) * counts[rows]).long()
        ids, target = captions[starts[rows] + place], components[rows]
        none = torch.rand(batch, 1, generator=generator) < empty
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            predicted = sketch.components(ids.masked_fill(none, 0))
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    sketch.requires_grad_(False)
    tenth = len(losses) // 10
    return [sum(losses[i : i + tenth]) / tenth for i in range(0, 10 * tenth, tenth)]
