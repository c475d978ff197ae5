"""LoRA as an argument: low-rank updates that travel with the tokens they act on (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """Low-rank updates by the path of the `Linear` they belong to; the backbone is never touched.

    `shapes` maps a path to (out, in). y = x W^T + scale * x A^T B^T with scale = alpha / rank (alpha absent: 1).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float | None = None):
        super().__init__()
        self.rank, self.scale = rank, (alpha or rank) / rank
        # ParameterDict keys may not hold dots.
        self.keys = {path: path.replace(".", "/") for path in shapes}
        self.a = nn.ParameterDict(
            {self.keys[p]: nn.Parameter(torch.randn(rank, i) / rank) for p, (_, i) in shapes.items()}
        )
        self.b = nn.ParameterDict({self.keys[p]: nn.Parameter(torch.zeros(o, rank)) for p, (o, _) in shapes.items()})

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """The update for tokens x (..., in) of the linear at `path`, or None where this LoRA has none."""
        key = self.keys.get(path)
        return None if key is None else (x @ self.a[key].mT @ self.b[key].mT) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """The published layout: `transformer.PATH.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank)."""
        out = {}
        for path, key in self.keys.items():
            out[f"transformer.{path}.lora_A.weight"] = self.a[key].detach()
            out[f"transformer.{path}.lora_B.weight"] = self.b[key].detach()
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], alpha: float | None = None) -> LoRA:
        """Read the layout of `tensors()`: rank and targets are inferred from the shapes."""
        paths = sorted(
            name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            for name in tensors
            if name.endswith(".lora_A.weight")
        )
        if not paths:
            first = next(iter(tensors), "nothing")
            raise ValueError(f"No LoRA found: expected names '*.lora_A.weight', found {first!r} and the like.")
        prefix = "transformer." if f"transformer.{paths[0]}.lora_A.weight" in tensors else ""
        pairs = {p: (tensors[f"{prefix}{p}.lora_A.weight"], tensors[f"{prefix}{p}.lora_B.weight"]) for p in paths}
        rank = pairs[paths[0]][0].shape[0]
        lora = cls({p: (b.shape[0], a.shape[1]) for p, (a, b) in pairs.items()}, rank, alpha)
        with torch.no_grad():
            for path, (a, b) in pairs.items():
                lora.a[lora.keys[path]].copy_(a)
                lora.b[lora.keys[path]].copy_(b)
        return lora


class Linear(nn.Linear):
    """A linear layer that takes the LoRA of the tokens it is given. `path` is set once by `name_linears`."""

    path = ""

    def forward(self, input: Tensor, lora: LoRA | None = None) -> Tensor:
        y = super().forward(input)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


def name_linears(model: nn.Module) -> None:
    """Tell every `Linear` its own module path, the name under which a LoRA knows it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            module.path = path


def linear_shapes(model: nn.Module, suffixes: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every `Linear` whose path ends with one of `suffixes` (whole path parts)."""
    wanted = tuple(suffixes)
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, Linear) and any(path == s or path.endswith("." + s) for s in wanted)
    }
