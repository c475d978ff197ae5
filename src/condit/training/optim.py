"""Optimisers: Muon for hidden matrices, AdamW for the rest; one schedule; an exponential average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from condit.training.prodigy import Prodigy


def parameter_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices, embeddings, the rest) of the trainable parameters.

    Adaptive norms and image projectors count as the rest: their inputs are timesteps and features, not tokens, and
    Muon's orthogonal steps cost most there.
    """
    matrices, embeddings, rest = [], [], []
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in tables:
            embeddings.append(p)
        elif (
            p.ndim == 2
            and min(p.shape) >= 64
            and not any(part in name for part in ("norm", "adaln", "embed", "image_proj"))
        ):
            matrices.append(p)
        else:
            rest.append(p)
    return matrices, embeddings, rest


def make_optimizers(
    module: nn.Module,
    *,
    lr: float,
    muon_lr: float | None,
    embedding_lr: float | None,
    weight_decay: float,
    beta2: float = 0.98,
    optimizer: Literal["adamw", "prodigy"] = "adamw",
) -> list[torch.optim.Optimizer]:
    """One AdamW or Prodigy, and before it Muon (Jordan et al. 2024) on hidden matrices with `muon_lr`."""
    matrices, embeddings, rest = parameter_groups(module)
    if optimizer == "prodigy" and (muon_lr is not None or embedding_lr is not None):
        raise ValueError("Prodigy estimates one step size for all weights; leave muon_lr and embedding_lr out.")
    if muon_lr is None or not matrices:
        matrices, rest = [], matrices + rest
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr or 0.0, weight_decay=weight_decay, momentum=0.95))
    groups = [{"params": rest, "lr": lr}]
    if embeddings:
        groups.append({"params": embeddings, "lr": embedding_lr or lr})
    if optimizer == "prodigy":
        every = [{"params": matrices + rest + embeddings}]
        optimizers.append(Prodigy(every, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay))
    else:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay))
    for each in optimizers:
        for group in each.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, steps: int, warmup: int, *, decay: bool = True) -> float:
    """Linear warm-up, constant until 20 % of the run, then linear to zero; without `decay` constant to the end."""
    if step < warmup:
        return (step + 1) / warmup
    if not decay:
        return 1.0
    return min(1.0, max(0.0, (steps - step) / (0.8 * steps)))


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Average:
    """Exponential moving average of the trainable parameters, in float32; decay_i = min(decay, i / (i + 10))."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.decay, self.count = decay, 0
        self.shadow = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        for name, p in parameters.items():
            self.shadow[name].lerp_(p.detach().float(), 1 - decay)
