"""Prodigy (Mishchenko & Defazio 2023, arXiv:2306.06101, Algorithm 4): Adam that estimates its own step size.

d estimates the distance from the start to the solution, from below; the step is d times Adam's. lr is a factor on it,
1 unless there is a reason. OminiControl was trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Prodigy(torch.optim.Optimizer):
    """weight_decay is decoupled. safeguard_warmup: the denominator of the estimate leaves lr out, so that a warm-up
    does not shrink it. bias_correction: Adam's."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        safeguard_warmup: bool = True,
        bias_correction: bool = True,
    ):
        if lr < 0 or d0 <= 0:
            raise ValueError(f"Prodigy needs lr >= 0 and d0 > 0; found {lr} and {d0}.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "d0": d0, "d": d0}
        defaults |= {"safeguard_warmup": safeguard_warmup, "bias_correction": bias_correction}
        super().__init__(params, {**defaults, "numerator": 0.0, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """All parameter groups share one estimate of d, which the first group stores."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = float(closure())
        first = self.param_groups[0]
        d, d0, k = first["d"], first["d0"], first["steps"]
        beta1, beta2 = first["betas"]
        # As Adam's two corrections in one factor of the step.
        correction = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if first["bias_correction"] else 1.0
        beta3 = math.sqrt(beta2)
        numerator: Tensor | float = first["numerator"] * beta3
        denominator: Tensor | float = 0.0
        for group in self.param_groups:
            step = d * group["lr"] * correction
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.float(), self.state[p]
                if not state:
                    state["start"] = p.detach().clone().float()
                    state |= {name: torch.zeros_like(state["start"]) for name in ("mean", "square", "weighted")}
                if group["lr"] > 0:
                    numerator = numerator + (d / d0) * step * (grad * (state["start"] - p.float())).sum()
                    state["mean"].mul_(beta1).add_(grad, alpha=d * (1 - beta1))
                    state["square"].mul_(beta2).addcmul_(grad, grad, value=d * d * (1 - beta2))
                    weight = (d / d0) * (d if group["safeguard_warmup"] else step)
                    state["weighted"].mul_(beta3).add_(grad, alpha=weight)
                    denominator = denominator + state["weighted"].abs().sum()
        first["numerator"], sum_ = float(numerator), float(denominator)
        new_d = max(d, first["numerator"] / sum_) if sum_ > 0 else d
        self.apply(d, new_d, correction)
        for group in self.param_groups:
            group["d"], group["steps"] = new_d, k + 1
        return loss

    def apply(self, d: float, new_d: float, correction: float) -> None:
        """Adam's step of size d; its epsilon grows with the new estimate, as the moments will."""
        for group in self.param_groups:
            step = d * group["lr"] * correction
            for p in group["params"]:
                if p.grad is None or group["lr"] == 0:
                    continue
                state = self.state[p]
                p.mul_(1 - group["weight_decay"] * step)
                p.sub_((step * state["mean"] / (state["square"].sqrt() + new_d * group["eps"])).to(p.dtype))
