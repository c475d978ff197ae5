"""LoRA as an argument: low-rank updates that travel with the tokens they act on (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class LowRank(Protocol):
    """The update of a linear layer's output for tokens x (..., in), or None where there is none."""

    def delta(self, path: str, x: Tensor) -> Tensor | None: ...


class LoRA(nn.Module):
    """Low-rank updates by the path of their `Linear`: y = x W^T + scale * x A^T B^T, scale = alpha / rank (1 without
    alpha). The backbone does not change.

    `shapes` maps a path to (out, in). Rank and alpha are numbers, or numbers by path.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int | Mapping[str, int],
        alpha: float | Mapping[str, float] | None = None,
    ):
        super().__init__()
        ranks = {p: rank if isinstance(rank, int) else rank[p] for p in shapes}
        alphas = {p: alpha.get(p) if isinstance(alpha, Mapping) else alpha for p in shapes}
        self.scales = {p: (alphas[p] or r) / r for p, r in ranks.items()}
        # Keys of a ParameterDict must not contain dots.
        self.keys = {path: path.replace(".", "/") for path in shapes}
        self.a = nn.ParameterDict(
            {self.keys[p]: nn.Parameter(torch.randn(ranks[p], i) / ranks[p]) for p, (_, i) in shapes.items()}
        )
        self.b = nn.ParameterDict(
            {self.keys[p]: nn.Parameter(torch.zeros(o, ranks[p])) for p, (o, _) in shapes.items()}
        )

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(a) for a in self.a.values())

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        """The update for tokens x (..., in) of the linear at `path`, or None where this LoRA has none."""
        key = self.keys.get(path)
        if key is None:
            return None
        # In training, the base model may be bfloat16 and these weights float32.
        a, b = self.a[key].to(x.dtype), self.b[key].to(x.dtype)
        return (x @ a.mT @ b.mT) * self.scales[path]

    def tensors(self) -> dict[str, Tensor]:
        """The published layout: `transformer.PATH.lora_A.weight` (rank, in) and `.lora_B.weight` (out, rank).

        B is multiplied by the scale, so every reader computes the same update, with alpha or without.
        """
        out = {}
        for path, key in self.keys.items():
            b, scale = self.b[key].detach(), self.scales[path]
            out[f"transformer.{path}.lora_A.weight"] = self.a[key].detach()
            out[f"transformer.{path}.lora_B.weight"] = b if scale == 1 else b * scale
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], alpha: float | None = None) -> LoRA:
        """Read the layout of `tensors()`, with or without an `.alpha` for each pair; shapes give ranks and targets.
        `alpha` overrides those of the file. ValueError for no pair, an A without B, or shapes that do not match."""
        paths = sorted(
            name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            for name in tensors
            if name.endswith(".lora_A.weight")
        )
        if not paths:
            first = next(iter(tensors), "nothing")
            raise ValueError(f"No LoRA in the file: expected names '*.lora_A.weight'; its first name is {first!r}.")
        prefix = "transformer." if f"transformer.{paths[0]}.lora_A.weight" in tensors else ""
        pairs = {}
        for path in paths:
            a, b = tensors[f"{prefix}{path}.lora_A.weight"], tensors.get(f"{prefix}{path}.lora_B.weight")
            if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
                actual = "no lora_B" if b is None else f"A {tuple(a.shape)} and B {tuple(b.shape)}"
                raise ValueError(f"{path}: expected A (rank, in) and B (out, rank), rank >= 1; found {actual}.")
            pairs[path] = a, b
        alphas = {p: float(tensors[f"{prefix}{p}.alpha"]) for p in paths if f"{prefix}{p}.alpha" in tensors}
        shapes = {p: (b.shape[0], a.shape[1]) for p, (a, b) in pairs.items()}
        lora = cls(shapes, {p: len(a) for p, (a, _) in pairs.items()}, alphas if alpha is None else alpha)
        with torch.no_grad():
            for path, (a, b) in pairs.items():
                lora.a[lora.keys[path]].copy_(a)
                lora.b[lora.keys[path]].copy_(b)
        return lora

    @torch.no_grad()
    def resized(self, rank: int) -> LoRA:
        """The nearest LoRA of at most this rank, by the largest singular values of each update (Eckart, Young 1936)."""
        tensors = {}
        for path, key in self.keys.items():
            u, s, v = torch.linalg.svd(self.b[key] @ self.a[key] * self.scales[path], full_matrices=False)
            root = s[:rank].sqrt()
            tensors[f"{path}.lora_A.weight"] = root[:, None] * v[:rank]
            tensors[f"{path}.lora_B.weight"] = u[:, :rank] * root
        return LoRA.from_tensors(tensors)

    def check_fits(self, model: nn.Module, source: object, name: str) -> None:
        """Raises ValueError, with the first such path, if the model `name` lacks a path or has it in another shape."""
        expected = linear_shapes(model, tuple(self.keys))
        for path, key in self.keys.items():
            shape = len(self.b[key]), self.a[key].shape[1]
            if expected.get(path) != shape:
                raise ValueError(
                    f"{source}: this LoRA adapts {path!r} of shape {shape}; {name} has {expected.get(path) or 'none'}. "
                    "Was it made for another model?"
                )


@dataclass(frozen=True)
class PartialLoRA:
    """A LoRA restricted to the paths in `only`, or to all but those in `without`, times a weight (0-d; None: 1)."""

    lora: LowRank
    weight: Tensor | None = None
    only: Collection[str] | None = None
    without: Collection[str] = ()

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        if path in self.without or (self.only is not None and path not in self.only):
            return None
        delta = self.lora.delta(path, x)
        return delta if delta is None or self.weight is None else delta * self.weight.to(delta)


def weighted(lora: LoRA, weight: float, *, without: Collection[str] = ()) -> PartialLoRA:
    """A LoRA times a number, which lies on its device: copied there in every layer, it would wait for the device."""
    device = next(lora.parameters()).device
    return PartialLoRA(lora, None if weight == 1 else torch.full((), float(weight), device=device), without=without)


@dataclass(frozen=True)
class LoRASum:
    """The sum of low-rank updates."""

    parts: tuple[LowRank, ...]

    def delta(self, path: str, x: Tensor) -> Tensor | None:
        total = None
        for part in self.parts:
            delta = part.delta(path, x)
            if delta is not None:
                total = delta if total is None else total + delta
        return total


def sum_loras(updates: Iterable[LowRank | None]) -> LowRank | None:
    """The sum of all updates that are not None; None if there are none."""
    parts = tuple(update for update in updates if update is not None)
    return parts[0] if len(parts) == 1 else LoRASum(parts) if parts else None


class Linear(nn.Linear):
    """A linear layer that takes the LoRA of its tokens as an argument. `name_linears` sets `path`."""

    path = ""

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = super().forward(input)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution over tokens (B, N, in), weight (out, in, 1, 1): a `Linear` as old checkpoints store it."""

    path = ""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, 1)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = nn.functional.linear(input, self.weight[:, :, 0, 0], self.bias)
        delta = None if lora is None else lora.delta(self.path, input)
        return y if delta is None else y + delta


def name_linears(model: nn.Module) -> None:
    """Set the `path` of every `Linear` and `Pointwise` to its module path, by which a LoRA names it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear | Pointwise):
            module.path = path


def linear_shapes(model: nn.Module, suffixes: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that takes a LoRA and whose path ends with one of `suffixes` (whole path parts)."""
    endings = tuple(suffixes)
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, Linear | Pointwise) and any(path == s or path.endswith("." + s) for s in endings)
    }
