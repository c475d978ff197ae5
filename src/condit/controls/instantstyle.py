"""InstantStyle: style without content, by the blocks in which an image prompt acts and by subtraction (Wang et al.
2024, arXiv:2404.02733). It adds no weights to an IP-Adapter.

The image branch acts in some blocks only, and words for the reference's content are subtracted from its embedding
before the projector. Also here: `block_weights`, the weight types of ComfyUI_IPAdapter_plus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast

import torch
from torch import Tensor

from condit.controls.control import Control, Where, check_arguments
from condit.controls.host import Host, within
from condit.controls.ip_adapter import IPAdapter, IPPlacing
from condit.controls.ip_input import References
from condit.controls.ip_projectors import HEAD_DIM
from condit.controls.ip_reference import WithLoRA
from condit.controls.wrap import Together
from condit.encoders.image import CLIPImage, TextTower, TinyTextTower
from condit.nn.attention import Site

if TYPE_CHECKING:
    from condit.data.images import ImageSource

Join = Literal["sum", "mean"]
Content = str | Sequence[str] | Sequence[Sequence[str]] | Tensor

# Prefixes of the blocks that act. They depend on the trained weights, not on the architecture: Playground v2.5 has
# SDXL's architecture and behaves differently.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "sdxl": {
        "all": (),
        "style": ("up_blocks.0.attentions.1",),
        "layout": ("down_blocks.2.attentions.1",),
        "style+layout": ("up_blocks.0.attentions.1", "down_blocks.2.attentions.1"),
    },
    # The official demo's; "experimental" in its own words. It runs with "all" and words subtracted.
    "sd15": {"all": (), "style": ("up_blocks.1",), "style+layout": ("down_blocks.2", "mid_block", "up_blocks.1")},
}


def family(backbone: Any) -> str:
    """ "sdxl" or "sd15". Raises ValueError for other models."""
    if not any(site.kind == "cross" for site in backbone.sites) or not hasattr(backbone.config, "down_block_types"):
        raise ValueError(
            f"No preset for {type(backbone).__name__}: InstantStyle's blocks are known for SDXL and SD 1.5. "
            "Rank its blocks with condit.controls.instantstyle.probe, and pass where= to IPAdapter.control."
        )
    # By its blocks, which the presets name: SDXL has no attention at the finest level, SD 1.x has.
    return "sdxl" if backbone.config.down_block_types[0] == "DownBlock2D" else "sd15"


def preset(name: str, backbone: Any) -> Where:
    """The layers of a preset. Raises ValueError for an unknown one."""
    table = PRESETS[family(backbone)]
    if name not in table:
        raise ValueError(f"No preset {name!r} for {family(backbone)}: {', '.join(table)}.")
    # Whole path parts: up_blocks.1 is not up_blocks.10.
    return Where(tuple(f"{prefix}.*" for prefix in table[name]) or ("*",))


@dataclass(frozen=True)
class InstantStyle:
    """An IP-Adapter used for style, and the text tower for the content to subtract."""

    adapter: IPAdapter
    text: TextTower | TinyTextTower | None = None

    @classmethod
    def load(
        cls,
        source: str | Path,
        pipe: Host,
        *,
        preset: str = "all",
        subfolder: str = "",
        weight_name: str = "",
        image_encoder: CLIPImage | str | Path | None = None,
        text_encoder: TextTower | str | Path | None = None,
        head_dim: int = HEAD_DIM,
    ) -> InstantStyle:
        """A published IP-Adapter; subfolder, weight_name, image_encoder: see `IPAdapter.load`. preset: load K', V' of
        its blocks only ("style": 15 % of SDXL's). text_encoder: the twin of the image encoder, or its folder; None: the
        pipeline's own, where it has one (SDXL's second)."""
        where = _preset(preset, pipe.backbone)
        source = within(source, subfolder, weight_name)
        adapter = IPAdapter.load(source, pipe, image_encoder=image_encoder, where=where, head_dim=head_dim)
        return cls(adapter, text_encoder if isinstance(text_encoder, TextTower) else pipe.text_tower(text_encoder))

    @property
    def save_pretrained(self):
        """Of the IP-Adapter, whose file it is."""
        return self.adapter.save_pretrained

    @property
    def push_to_hub(self):
        return self.adapter.push_to_hub

    def control(
        self,
        reference: References | None = None,
        strength: float = 1.0,
        *,
        preset: str = "style",
        style: References | None = None,
        layout: References | None = None,
        layout_strength: float | None = None,
        content: Content | None = None,
        content_scale: float = 1.0,
        join: Join = "sum",
        **how: Unpack[IPPlacing],
    ) -> Control:
        """A control from one reference in the blocks of a preset, or from `style` and `layout`, each in its own.

        strength: lambda in the blocks; layout_strength: of the layout, None: the same. content: words for the content
        to subtract from the (style) reference: a phrase, a list of them, a list for each image, or their embedding (E,)
        or (n, E); content_scale times their `join` is subtracted. It is not a percentage: image and text embeddings
        differ in length. how: see IPPlacing."""
        check_arguments(strength, how, IPPlacing)
        backbone = self.adapter._bound().backbone
        if (reference is None) == (style is None and layout is None):
            raise ValueError("Give one reference, or style= and layout=.")
        taken = None if content is None else self.content(content, join) * content_scale
        pairs = [(style, "style", strength, taken)]
        pairs += [(layout, "layout", strength if layout_strength is None else layout_strength, None)]
        if reference is not None:
            pairs = [(reference, preset, strength, taken)]
        controls = [
            self.adapter.control(
                source,
                strength=value,
                where=self.held(_preset(name, backbone), name),
                content=words,
                **how,
            )
            for source, name, value, words in pairs
            if source is not None
        ]
        return controls[0] if len(controls) == 1 else together(controls)

    def held(self, where: Where, name: str) -> Where:
        """Raises ValueError if the adapter was loaded without the blocks of this preset."""
        needed = [x.path for x in (*self.adapter.layers, *self.adapter.absent) if Site(x.path, "cross", 0) in where]
        missing = sorted(set(needed) - set(self.adapter.sites))
        if missing:
            raise ValueError(f"preset {name!r} acts at {missing[0]}, whose K', V' were not loaded. Load more blocks.")
        return where

    def content(self, words: Content, join: Join = "sum") -> Tensor:
        """Words -> a vector (E,), or one an image (n, E), in the space of the image embeddings."""
        if self.adapter.config.feature != "embeds":
            raise ValueError(
                f"{self.adapter.name or 'This adapter'} reads {self.adapter.config.feature} features, from which "
                "words cannot be subtracted. Use a global adapter, or leave content= out."
            )
        if isinstance(words, Tensor):
            return self._fitting(words)
        phrases = [words] if isinstance(words, str) else list(words)
        if phrases and all(isinstance(p, list | tuple) for p in phrases):
            return torch.stack([self.content(each, join) for each in cast("list[Content]", phrases)])
        if not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise ValueError(f"content must be words for what the reference shows; found {words!r}. Leave it out.")
        if join not in ("sum", "mean"):
            raise ValueError(f"join must be 'sum' or 'mean'; found {join!r}.")
        if self.text is None:
            raise ValueError(
                "content= needs the text tower of the image encoder's CLIP: text_encoder= in "
                "InstantStyle.load (for SD 1.5 that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K; its own is another CLIP)."
            )
        encoder = self.adapter._encoder[0]
        if encoder is not None and isinstance(self.text, TextTower):
            self.text.check_twin(encoder.size)
        vectors = self.text(phrases)
        return self._fitting(vectors.sum(0) if join == "sum" else vectors.mean(0))

    def _fitting(self, vector: Tensor) -> Tensor:
        if vector.ndim not in (1, 2) or vector.shape[-1] != self.adapter.config.features:
            raise ValueError(
                f"a content vector of width {vector.shape[-1]}; the image embeddings have "
                f"{self.adapter.config.features}. It must come from the text tower of the image encoder's CLIP."
            )
        return vector


_preset = preset  # for functions with an argument of this name


def together(controls: Sequence[Control]) -> Control:
    """Controls of one adapter as one."""
    parts: list[Control] = []
    for control in controls:
        for inner in control.inside if isinstance(control, WithLoRA) else (control,):
            parts += inner.inside if isinstance(inner, Together) else (inner,)
    joined = Together(tuple(parts))
    first = controls[0]
    return replace(first, inner=joined) if isinstance(first, WithLoRA) else joined


# Weight types of ComfyUI_IPAdapter_plus


@dataclass(frozen=True)
class BlockWeights:
    """Strengths by attention module, for IPAdapter.control(strength=, against=)."""

    strength: Mapping[str, float]
    against: tuple[str, ...] | None = None


def modules_of(sites: Sequence[Site]) -> list[str]:
    """The attention modules of a UNet in the order of execution: down, middle, up. Their places are ComfyUI's indices:
    6 is SDXL's style, 3 its layout."""
    modules = list(dict.fromkeys(s.path.split(".transformer_blocks.")[0] for s in sites if s.kind == "cross"))
    return sorted(modules, key=lambda path: ("down", "mid_", "up_b").index(path[:4]))  # sorted keeps the order within


EASES: dict[str, Callable[[float], float]] = {  # of t/n, the place among n modules
    "linear": lambda x: 1.0,
    "ease in": lambda x: 0.05 + 0.95 * (1 - x),
    "ease out": lambda x: 0.05 + 0.95 * x,
    "ease in-out": lambda x: 0.05 + 0.95 * (1 - abs(2 * x - 1)),
    "reverse in-out": lambda x: 0.05 + 0.95 * abs(2 * x - 1),
}
# stage -> the modules that keep the whole weight, the others get a fifth
STAGES: dict[str, tuple[str, ...]] = {
    "weak input": ("mid_", "up_b"),
    "weak middle": ("down", "up_b"),
    "weak output": ("down", "mid_"),
    "strong middle": ("mid_",),
}
_FINE = (*range(4), *range(9, 16))  # SD 1.5's style, as ComfyUI has it
CHOICES = ("style transfer", "composition", "strong style transfer", "style and composition")
PRECISE = ("style transfer precise", "composition precise")
WEIGHT_TYPES = (*EASES, *STAGES, *CHOICES, *PRECISE)


def block_weights(
    kind: str, sites: Sequence[Site], weight: float = 1.0, *, composition: float = 1.0, boost: float | None = None
) -> BlockWeights:
    """A weight type by its name in ComfyUI, for SDXL's 11 or SD 1.5's 16 attention modules.

    composition: the weight of the layout in "style and composition"; boost: of the negative part in the "precise"
    ones (None: `weight`): there the reference acts on the negative side, so that guidance leads away from its layout or
    style.
    """
    modules = modules_of(sites)
    n = len(modules)
    if kind in EASES:
        return BlockWeights({m: weight * EASES[kind](t / n) for t, m in enumerate(modules)})
    if kind in STAGES:
        return BlockWeights({m: weight if m.startswith(STAGES[kind]) else 0.2 * weight for m in modules})
    if kind not in WEIGHT_TYPES:
        raise ValueError(f"No weight type {kind!r}: {', '.join(WEIGHT_TYPES)}.")
    if n not in (11, 16):
        raise ValueError(f"{kind!r} is known for SDXL's 11 attention modules and SD 1.5's 16; found {n}.")
    layout = {3: 1.0} if n == 11 else {4: 0.25, 5: 1.0}
    style = (6,) if n == 11 else _FINE
    pushed = weight if boost is None else boost
    rest = 0.1 * (weight if n == 11 else pushed)
    by_place: dict[int, float] = {
        "style transfer": dict.fromkeys(style, weight),
        "composition": {t: weight * share for t, share in layout.items()},
        "strong style transfer": {t: weight for t in range(n) if t not in layout},
        "style and composition": {
            **{t: composition * share for t, share in layout.items()},
            **dict.fromkeys(style, weight),
        },
        "style transfer precise": {
            **{t: pushed * share for t, share in layout.items()},
            **dict.fromkeys(style, weight),
        },
        "composition precise": {
            **dict.fromkeys(range(n), rest),
            **{t: weight * share for t, share in layout.items()},
            **dict.fromkeys(style, pushed),
        },
    }[kind]
    turned = {
        "style transfer precise": list(layout),
        "composition precise": [t for t in range(n) if t not in layout],
    }.get(kind)
    away = None if turned is None else tuple(f"{modules[t]}.*" for t in turned)
    return BlockWeights({modules[t]: w for t, w in by_place.items()}, away)


# The blocks that carry style, for any backbone


@dataclass(frozen=True)
class BlockScore:
    """The effect of one block: the increase of style and of leakage over no reference, each with the half width of a 95
    % interval over n images."""

    block: str
    style: float
    style_error: float
    leakage: float
    leakage_error: float
    n: int


T = TypeVar("T")  # an image
Measure = Callable[[Sequence[T], "ImageSource"], Sequence[float]]


def probe(
    generate: Callable[[Sequence[Control]], Sequence[T]],
    adapter: IPAdapter,
    references: Sequence[ImageSource],
    *,
    style: Measure[T],
    leakage: Measure[T],
    blocks: Sequence[str] | None = None,
    strength: float = 1.0,
) -> list[BlockScore]:
    """Scores of blocks that act alone, the most style over leakage first.

    generate(controls) -> images of the same prompts and seeds each time. style and leakage(images, reference) -> one
    number an image: how near in style, and how much of the reference's content is in it. blocks: prefixes of paths;
    None: every attention module of the adapter.
    """
    if blocks is None:
        blocks = list(dict.fromkeys(path.split(".transformer_blocks.")[0] for path in adapter.sites))
    if not references or not blocks:
        raise ValueError(f"{len(references)} references and {len(blocks)} blocks: at least one of each is needed.")
    plain = generate([])
    before = [(list(style(plain, r)), list(leakage(plain, r))) for r in references]
    scores = []
    for block in blocks:
        gains: list[float] = []
        leaks: list[float] = []
        for reference, (style_before, leak_before) in zip(references, before, strict=True):
            images = generate([adapter.control(reference, strength=strength, where=(block, f"{block}.*"))])
            gains += [a - b for a, b in zip(style(images, reference), style_before, strict=True)]
            leaks += [a - b for a, b in zip(leakage(images, reference), leak_before, strict=True)]
        scores.append(BlockScore(block, *interval(gains), *interval(leaks), len(gains)))
    return sorted(scores, key=lambda score: score.leakage - score.style)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; an infinite one for a single value."""
    error = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return fmean(values), error
