"""DEADiff in a UNet (arXiv:2403.06951): the tokens that each cross-attention layer reads, its image maps, masks at each
resolution, and the choices of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Literal, cast, get_args

from torch import Tensor, nn

from condit.controls.control import Placing, Where, one_of, region_levels
from condit.encoders.qformer import BERT_WORDS
from condit.nn.attention import Site

if TYPE_CHECKING:
    from condit.backbones.unet import UNet

Name = Literal["style", "content"]
SETS: tuple[Name, Name] = ("style", "content")
Combine = Literal["mean", "concat"]
# What the strength m multiplies: keys and values, as released; values alone; or the attention to the tokens (m = 0:
# they are absent).
Acts = Literal["keys-values", "values", "attention"]
Empty = Literal["zeros", "absent"]
# Cross-attention layers in the order of the forward pass, of sixteen (`content_layer` of the released configuration).
CONTENT_LAYERS = (4, 5, 6, 7, 8)


@dataclass(frozen=True)
class DEADiffConfig:
    """content_layers: which cross-attention layers, in forward order, take content; the others take style. words: token
    numbers of the words that the Q-Formers read."""

    content_layers: tuple[int, ...] = CONTENT_LAYERS
    words: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(BERT_WORDS))


class LayerPlacing(Placing, total=False):
    """where: the layers at which it acts."""

    where: Where | str | tuple[str, ...] | None


def layer_table(sites: Sequence[Site], content_layers: Sequence[int] = CONTENT_LAYERS) -> dict[str, Name]:
    """Path of each cross-attention layer, in the order of the forward pass -> the set of tokens that it takes."""
    if isinstance(content_layers, str | int) or not all(type(i) is int for i in content_layers):
        raise ValueError(f"content_layers are numbers of layers, such as {CONTENT_LAYERS}; found {content_layers!r}.")
    depth = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    cross = [site.path for site in sites if site.kind == "cross"]
    # A UNet may list its middle block last, as diffusers does.
    forward = sorted(cross, key=lambda path: depth.get(path.split(".")[0], 0))
    wrong = [i for i in content_layers if not 0 <= i < len(forward)]
    if wrong:
        raise ValueError(f"content_layers has {wrong[0]}; expected numbers from 0 to {len(forward) - 1}.")
    return {path: "content" if i in content_layers else "style" for i, path in enumerate(forward)}


def coarse_layers(count: int) -> tuple[int, ...]:
    """The content layers of a UNet of `count` cross-attention layers: from a quarter to a half of the way, which are
    the released 4..8 of 16."""
    return tuple(range(count // 4, count // 2 + 1))


class ImageMaps(nn.Module):
    """W_k' and W_v' of one layer."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.image_k, self.image_v = nn.Linear(width, dim, bias=False), nn.Linear(width, dim, bias=False)


def plant(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, with empty modules in between."""
    *way, last = path.split(".")
    for part in way:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def cross_shapes(backbone: UNet, name: str = "this model") -> dict[str, tuple[int, int]]:
    """Path of each cross-attention layer -> width of the text that it reads, width of its keys. Raises ValueError for a
    model without any."""
    paths = [site.path for site in backbone.sites if site.kind == "cross"]
    if not paths:
        raise ValueError(
            f"DEADiff needs layers of cross-attention to the text; {name} has none. For an MM-DiT use condit.IPAdapter."
        )
    keys = {path: cast("nn.Linear", backbone.get_submodule(f"{path}.to_k")) for path in paths}
    return {path: (linear.in_features, linear.out_features) for path, linear in keys.items()}


def check_maps(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], source: object, model: str
) -> None:
    """Raises ValueError unless the file's K', V' maps are those of this model's layers."""
    own = {n[5 : -len(".image_k.weight")]: tuple(v.shape) for n, v in tensors.items() if n.endswith(".image_k.weight")}
    if not own:
        near = sorted(n for n in tensors if "to_k" in n or "image" in n)[:3]
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{source} has no image K', V' (unet.PATH.attn2.image_k.weight){hint}.")
    if own.keys() != shapes.keys():
        missing = sorted(shapes.keys() - own.keys())[:1] or sorted(own.keys() - shapes.keys())[:1]
        raise ValueError(
            f"{source} has image K', V' of {len(own)} layers; {model} has {len(shapes)} cross-attention layers "
            f"(first difference: {missing[0]}). Was it made for another model?"
        )
    for path, (width, dim) in shapes.items():
        if own[path] != (dim, width):
            raise ValueError(
                f"{source}: K' of {path} is {own[path]}; {model} needs {(dim, width)}. DEADiff was made for Stable "
                "Diffusion 1.5 and its fine-tunes (text width 768)."
            )


def log_regions(mask: Tensor, grid: tuple[int, int]) -> dict[int, Tensor]:
    """Pixel mask (B, H, W) in [0, 1] -> the logarithm of it (B, 1, N, 1) for the N cells of each level of a UNet."""
    return {n: region.clamp(0, 1).log() for n, region in region_levels(mask, grid).items()}


def check_choices(acts: str, empty: str, combine: str, strength: float, content_strength: float | None) -> None:
    one_of("acts", acts, get_args(Acts))
    one_of("empty", empty, get_args(Empty))
    one_of("combine", combine, get_args(Combine))
    strengths = [strength, strength if content_strength is None else content_strength]
    for value in strengths:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"strength is one number for all images of a control; found {value!r}.")
    if acts == "attention" and min(strengths) < 0:
        raise ValueError('A weight of the attention cannot be negative. Use strength >= 0, or acts="keys-values".')
