"""LoRA as an argument: low-rank updates that travel with the tokens they act on (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]  # of a layer's weight: (out, in), of a convolution (out, in, height, width)


class LowRank(Protocol):
    """The update of a layer's output, or None where there is none: for tokens x (..., in) of a linear layer, or for a
    feature map x (B, in, H, W) of a convolution with this stride."""

    def delta(self, path: str, x: Tensor, stride: int = 1) -> Tensor | None: ...


class LoRA(nn.Module):
    """Low-rank updates by the path of their layer: y = x W^T + scale * x A^T B^T, scale = alpha / rank (1 without
    alpha). The backbone does not change.

    `shapes` maps a path to the shape of its weight. Rank and alpha are numbers, or numbers by path. A file may add to
    the layer's bias (`bias`), or give each row of W + scale * B A another norm (`gains`; DoRA, Liu et al. 2024,
    arXiv:2402.09353): y = gain * (x W^T + scale * x A^T B^T). The gains are those of strength 1.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
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
            {self.keys[p]: nn.Parameter(torch.randn(ranks[p], *i) / ranks[p]) for p, (_, *i) in shapes.items()}
        )
        self.b = nn.ParameterDict(
            {self.keys[p]: nn.Parameter(torch.zeros(o, ranks[p])) for p, (o, *_) in shapes.items()}
        )
        self.bias, self.gains = nn.ParameterDict(), nn.ParameterDict()
        self.bases: dict[
            str, Tensor
        ] = {}  # the backbone's weights where there are gains; not parameters of this module

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(len(a) for a in self.a.values())

    def delta(self, path: str, x: Tensor, stride: int = 1) -> Tensor | None:
        """See `LowRank`."""
        key = self.keys.get(path)
        if key is None:
            return None
        # In training, the base model may be bfloat16 and these weights float32.
        a, b = self.a[key].to(x.dtype), self.b[key].to(x.dtype)
        if a.ndim == 2:
            y = (x @ a.mT @ b.mT) * self.scales[path]
        else:
            y = F.conv2d(convolve(x, a, stride), b[:, :, None, None]) * self.scales[path]
        if key in self.gains:
            gain, base = per_row(self.gains[key], a).to(x.dtype), self.bases[path].to(x)
            plain = F.linear(x, base.flatten(1)) if a.ndim == 2 else convolve(x, base, stride)
            y = gain * y + (gain - 1) * plain
        return y + per_row(self.bias[key], a).to(x.dtype) if key in self.bias else y

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
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], alpha: float | None = None, model: nn.Module | None = None
    ) -> LoRA:
        """Read the layout of `tensors()`; shapes give ranks and targets. Each pair may have an `.alpha`, which `alpha`
        overrides, a `.bias`, and a DoRA's `.magnitude` of the rows (out,), which needs the `model` that it updates.
        Raises ValueError for no pair, an A without B, or shapes that do not match."""
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
            if b is None or a.ndim not in (2, 4) or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
                actual = "no lora_B" if b is None else f"A {tuple(a.shape)} and B {tuple(b.shape)}"
                raise ValueError(f"{path}: expected A (rank, in) and B (out, rank), rank >= 1; found {actual}.")
            pairs[path] = a, b
        alphas = {p: float(tensors[f"{prefix}{p}.alpha"]) for p in paths if f"{prefix}{p}.alpha" in tensors}
        shapes = {p: (b.shape[0], *a.shape[1:]) for p, (a, b) in pairs.items()}
        lora = cls(shapes, {p: len(a) for p, (a, _) in pairs.items()}, alphas if alpha is None else alpha)
        with torch.no_grad():
            for path, (a, b) in pairs.items():
                lora.a[lora.keys[path]].copy_(a)
                lora.b[lora.keys[path]].copy_(b)
                if (bias := tensors.get(f"{prefix}{path}.bias")) is not None:
                    lora.bias[lora.keys[path]] = nn.Parameter(bias.float())
                if (magnitude := tensors.get(f"{prefix}{path}.magnitude")) is not None:
                    lora.decompose(path, magnitude, model)
        return lora

    def decompose(self, path: str, magnitude: Tensor, model: nn.Module | None) -> None:
        """Give the rows of the layer's updated weight these norms (out,). Raises ValueError without a model, or where
        its weight is quantised or elsewhere. A layer that the model does not have is left to `check_fits`."""
        layer = dict(model.named_modules()).get(path) if model is not None else None
        weight = layer.weight if isinstance(layer, Linear | Pointwise | Conv) else None
        update = self.scales[path] * (self.b[self.keys[path]] @ self.a[self.keys[path]].flatten(1))
        if model is not None and (weight is None or weight.flatten(1).shape != update.shape):
            return
        plain = weight is not None and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
        if weight is None or not plain or weight.is_meta:
            raise ValueError(
                f"{path}: a DoRA scales the rows of the layer's own weight, which is not at hand here: it needs a "
                "model without quantised or sequentially offloaded weights, and cannot be an OminiControl."
            )
        norms = (weight.detach().float().flatten(1) + update.to(weight.device)).norm(dim=1)
        self.gains[self.keys[path]], self.bases[path] = nn.Parameter(magnitude.to(norms) / norms), weight

    @torch.no_grad()
    def resized(self, rank: int) -> LoRA:
        """The nearest LoRA of at most this rank, by the largest singular values of each update (Eckart, Young 1936)."""
        tensors = {}
        for path, key in self.keys.items():
            a = self.a[key].flatten(1)
            u, s, v = torch.linalg.svd(self.b[key] @ a * self.scales[path], full_matrices=False)
            root = s[:rank].sqrt()
            tensors[f"{path}.lora_A.weight"] = (root[:, None] * v[:rank]).unflatten(1, self.a[key].shape[1:])
            tensors[f"{path}.lora_B.weight"] = u[:, :rank] * root
        return LoRA.from_tensors(tensors)

    def check_fits(self, model: nn.Module, source: object, name: str) -> None:
        """Raises ValueError, with the first such path, if the model `name` lacks a path or has it in another shape."""
        expected = linear_shapes(model, tuple(self.keys))
        for path, key in self.keys.items():
            shape = len(self.b[key]), *self.a[key].shape[1:]
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

    def delta(self, path: str, x: Tensor, stride: int = 1) -> Tensor | None:
        if path in self.without or (self.only is not None and path not in self.only):
            return None
        delta = self.lora.delta(path, x, stride)
        return delta if delta is None or self.weight is None else delta * self.weight.to(delta)


def weighted(lora: LoRA, weight: float, *, without: Collection[str] = ()) -> PartialLoRA:
    """A LoRA times a number, which is on its device: copied there in every layer, it would wait for the device."""
    device = next(lora.parameters()).device
    return PartialLoRA(lora, None if weight == 1 else torch.full((), float(weight), device=device), without=without)


@dataclass(frozen=True)
class LoRASum:
    """The sum of low-rank updates."""

    parts: tuple[LowRank, ...]

    def delta(self, path: str, x: Tensor, stride: int = 1) -> Tensor | None:
        total = None
        for part in self.parts:
            delta = part.delta(path, x, stride)
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


class Conv(nn.Conv2d):
    """A convolution of a feature map (B, in, H, W) that takes a LoRA as an argument (LoCon)."""

    path = ""

    def forward(self, input: Tensor, lora: LowRank | None = None) -> Tensor:
        y = super().forward(input)
        delta = None if lora is None else lora.delta(self.path, input, self.stride[0])
        return y if delta is None else y + delta


def convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """x (B, in, H, W) with a kernel of odd size, whose padding keeps the size at stride 1."""
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Numbers (out,) of a layer's rows as they broadcast over its output; like: its weight, or A."""
    return values if like.ndim == 2 else values[:, None, None]


def name_linears(model: nn.Module) -> None:
    """Set the `path` of every layer that takes a LoRA to its module path, by which a LoRA names it."""
    for path, module in model.named_modules():
        if isinstance(module, Linear | Pointwise | Conv):
            module.path = path


def linear_shapes(model: nn.Module, suffixes: Iterable[str]) -> dict[str, Shape]:
    """(out, in) of every layer that takes a LoRA and whose path ends with one of `suffixes` (whole path parts); of a
    convolution its kernel too."""
    endings = tuple(suffixes)
    return {
        path: tuple(module.weight.shape) if isinstance(module, Conv) else (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, Linear | Pointwise | Conv) and any(path == s or path.endswith("." + s) for s in endings)
    }
