"""Muon (Jordan et al. 2024) in the arithmetic of the run, all matrices of one shape at once.

torch.optim.Muon iterates in bf16 and one matrix at a time; on a CPU without bf16 arithmetic that takes longer than the
rest of the training step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalise(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (B, m, n) -> about U V^T of their singular value decompositions, by Newton-Schulz in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; a tall matrix steps by sqrt(rows / columns) more."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, parameters in shapes.items():
                for p in parameters:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                self.step_shape(parameters, group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5, group["momentum"])

    def step_shape(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        """One step of the matrices of one shape."""
        updates = []
        for p in parameters:
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(buffer, momentum))
        for p, update in zip(parameters, orthogonalise(torch.stack(updates), dtype=self.dtype), strict=True):
            p.add_(update, alpha=-lr)
