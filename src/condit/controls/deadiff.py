"""DEADiff: style and content of a reference, separately (Qi et al. 2024, arXiv:2403.06951).

Two Q-Formers read the reference, with the words "style" and "content". Their tokens c_i join the text c_t
in one softmax, style in the fine cross-attention layers of the UNet and content in the coarse ones:
out = softmax(q [W_k c_t; m W_k' c_i]^T / sqrt(d)) [W_v c_t; m W_v' c_i]. A missing set is zeros, not absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from condit.controls import publish
from condit.controls.control import (
    Control,
    Run,
    Step,
    When,
    Where,
    check_arguments,
    check_layers,
    check_reach,
    match_batch,
)
from condit.controls.deadiff_layers import (
    CONTENT_LAYERS,
    SETS,
    Acts,
    Combine,
    DEADiffConfig,
    Empty,
    ImageMaps,
    LayerPlacing,
    Name,
    check_choices,
    check_maps,
    coarse_layers,
    cross_shapes,
    layer_table,
    log_regions,
    plant,
)
from condit.controls.host import Host, save_adapter, within
from condit.controls.ip_input import References, grouped
from condit.data.images import load_image, load_masks
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.image import TinyImage
from condit.encoders.qformer import BERT_WORDS, QFormer, QFormerConfig, word_ids
from condit.nn.attention import Attend, Call, Site, split_heads

if TYPE_CHECKING:
    from condit.backbones.unet import UNet
    from condit.data.images import ImageSource

# The negative prompt of the released script.
NEGATIVE_PROMPT = (
    "over-exposure, under-exposure, saturated, duplicate, out of frame, lowres, cropped, worst quality, low quality, "
    "jpeg artifacts, morbid, mutilated, out of frame, ugly, bad anatomy, bad proportions, deformed, blurry, duplicate"
)


class DEADiff(nn.Module):
    """An adapter: `style.*` and `content.*` (Q-Former and projection), `unet.PATH.image_k`, `.image_v` of every cross-
    attention layer. The frozen image tower is not saved with it."""

    def __init__(
        self,
        config: DEADiffConfig,
        style: QFormer,
        content: QFormer,
        maps: Mapping[str, tuple[int, int]],
        *,
        tower: ClipPatches | None = None,
        pipe: Host | None = None,
    ):
        """maps: path of each cross-attention layer -> width of the tokens, width of its keys."""
        super().__init__()
        self.config, self.name, self.hash = config, "", ""
        self.style, self.content, self.unet = style, content, nn.Module()
        self.paths = tuple(maps)
        for path, shape in maps.items():
            plant(self.unet, path, ImageMaps(*shape))
        # In lists, so that their weights are not registered here.
        self._tower: list[ClipPatches | None] = [tower]
        self._pipe: list[Host | None] = [pipe]

    @classmethod
    def new(
        cls,
        backbone: UNet,
        qformer: QFormerConfig,
        tower: ClipPatches,
        *,
        config: DEADiffConfig | None = None,
        pipe: Host | None = None,
    ) -> DEADiff:
        """An untrained adapter for a UNet: W_k', W_v' start as the text's W_k, W_v, both Q-Formers at random (those of
        BLIP-Diffusion's release in the paper)."""
        shapes = cross_shapes(backbone)
        config = config or DEADiffConfig(coarse_layers(len(shapes)))
        layer_table(backbone.sites, config.content_layers)
        if wrong := next((path for path, (width, _) in shapes.items() if width != qformer.width), None):
            raise ValueError(f"Q-Former tokens have width {qformer.width}; {wrong} reads {shapes[wrong][0]}.")
        adapter = cls(config, QFormer(qformer), QFormer(qformer), shapes, tower=tower, pipe=pipe)
        adapter.start_from_text(backbone)
        return adapter

    @classmethod
    def load(
        cls,
        source: str | Path,
        pipe: Host,
        *,
        subfolder: str = "",
        weight_name: str = "",
        image_encoder: str | Path | ClipPatches | None = None,
    ) -> DEADiff:
        """From the published `.ckpt`, or a name (also on a hub), file or folder of ours. subfolder, weight_name: see
        `IPAdapter.load`. image_encoder: the folder of CLIP ViT-L/14, where file and model have none."""
        source = within(source, subfolder, weight_name)
        file = pipe.adapter_file(source, "DEADiff")
        tensors = {n: v for n, v in file.tensors.items() if not n.startswith("tower.")}
        shapes = cross_shapes(pipe.backbone, pipe.name)
        check_maps(tensors, shapes, source, pipe.name)
        own = {n.removeprefix("tower."): v for n, v in file.tensors.items() if n.startswith("tower.")}
        tower = ClipPatches.of(own, heads=file.config.get("tower_heads")) if own else image_encoder
        if tower is None and isinstance(pipe.image, TinyImage):
            tower = pipe.image.patches()
        if tower is None:
            raise ValueError(f"{source} has no image tower. Give image_encoder=, the folder of CLIP ViT-L/14.")
        if not isinstance(tower, ClipPatches):
            tower = ClipPatches(pipe.image_encoder(tower).model.vision_model)
        readers, text_width = [], next(iter(shapes.values()))[0]
        for name in SETS:
            own = {n.removeprefix(f"{name}."): v for n, v in tensors.items() if n.startswith(f"{name}.")}
            sizes = QFormerConfig.of(own, heads=file.config.get("heads"), source=f"{source}, {name}")
            if sizes.width != text_width:
                raise ValueError(
                    f"{source}: the {name} Q-Former has tokens of width {sizes.width}; the text of {pipe.name}, "
                    f"which they join, has width {text_width}. Was it made for another model?"
                )
            readers.append(QFormer(sizes))
        if readers[0].config.image_width != tower.features:
            raise ValueError(
                f"{source} reads image tokens of width {readers[0].config.image_width}; the image encoder gives "
                f"{tower.features}. DEADiff's is CLIP ViT-L/14 (1024)."
            )
        words = {word: tuple(ids) for word, ids in file.config.get("words", BERT_WORDS).items()}
        config = DEADiffConfig(tuple(file.config.get("content_layers", CONTENT_LAYERS)), words)
        layer_table(pipe.backbone.sites, config.content_layers)
        adapter = cls(config, readers[0], readers[1], shapes, tower=tower, pipe=pipe)
        file.load_into(adapter, {n: v.float() for n, v in tensors.items()})
        adapter.name, adapter.hash = file.name, file.hash
        tower.eval().requires_grad_(False).to(pipe.device)
        return adapter.eval().requires_grad_(False).to(pipe.device)

    @property
    def tower(self) -> ClipPatches:
        if self._tower[0] is None:
            raise ValueError("This adapter has no image tower. Use DEADiff.load(name, pipe) or DEADiff.new(...).")
        return self._tower[0]

    def maps(self, path: str) -> ImageMaps:
        return cast("ImageMaps", self.unet.get_submodule(path))

    @torch.no_grad()
    def start_from_text(self, backbone: UNet) -> None:
        """W_k', W_v' as copies of the text's: where training starts, and never after it."""
        for path in self.paths:
            self.maps(path).image_k.weight.copy_(backbone.get_parameter(f"{path}.to_k.weight"))
            self.maps(path).image_v.weight.copy_(backbone.get_parameter(f"{path}.to_v.weight"))

    save = save_adapter

    def tensors(self) -> dict[str, Tensor]:
        return {k: v.detach() for k, v in self.state_dict().items()}

    def metadata(self) -> dict:
        """The configuration that `load` reads from the file."""
        words = {word: list(ids) for word, ids in self.config.words.items()}
        layers, heads = list(self.config.content_layers), self.style.config.heads
        return {"method": "DEADiff", "content_layers": layers, "heads": heads, "words": words}

    save_pretrained, push_to_hub = publish.save_pretrained, publish.push_to_hub

    def ask(self, name: Name, image: Tensor) -> Tensor:
        """One Q-Former with its word: tower tokens (B, N, W) -> (B, T, width)."""
        ids = word_ids(name, len(image), self.config.words).to(image.device)
        return getattr(self, name)(image, ids)

    def tokens(self, name: Name, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> style or content tokens (B, T, width)."""
        return self.ask(name, self.tower(images))

    def keys_values(self, tokens: Mapping[Name, Tensor], table: Mapping[str, Name]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens (B, T, width) of each set -> path of each layer that takes one -> K', V', each (B, T, dim)."""
        pairs = {}
        for path, name in table.items():
            if name in tokens:
                maps = self.maps(path)
                c = tokens[name].to(maps.image_k.weight.dtype)
                pairs[path] = (maps.image_k(c), maps.image_v(c))
        return pairs

    def reference(
        self,
        tokens: Mapping[Name, Tensor],
        *,
        strength: Mapping[Name, float] | None = None,
        empty: Empty = "zeros",
        content_layers: Sequence[int] | None = None,
        where: Where | None = None,
    ) -> DEADiffReference:
        """A control from tokens (B, T, width) of one set or both; the other is zeros, or `empty="absent"`."""
        if not tokens:
            raise ValueError("No reference: give style=, content= or both.")
        like, c = next(iter(tokens.values())), self.style.config
        if empty == "zeros":
            tokens = {**{name: like.new_zeros(1, c.queries, c.width) for name in SETS}, **tokens}
        sites = [Site(path, "cross", i) for i, path in enumerate(self.paths)]
        table = layer_table(sites, self.config.content_layers if content_layers is None else content_layers)
        if where is not None:
            check_reach(where, self.paths)
            table: dict[str, Name] = {p: table[p] for p in table if Site(p, "cross", 0) in where}
        each: dict[Name, float] = {name: (strength or {}).get(name, 1.0) for name in SETS}
        kv = self.keys_values(tokens, table)
        taken: dict[str, Name] = {path: table[path] for path in kv}
        return DEADiffReference(kv=kv, table=taken, adapter=self, strength=each)

    def control(
        self,
        style: References | None = None,
        strength: float = 1.0,
        *,
        content: References | None = None,
        content_strength: float | None = None,
        acts: Acts = "keys-values",
        empty: Empty = "zeros",
        combine: Combine = "mean",
        weights: Sequence[float] | None = None,
        content_layers: Sequence[int] | None = None,
        content_prompt: str | Sequence[str] | None = None,
        **placing: Unpack[LayerPlacing],
    ) -> DEADiffReference:
        """A control from references for style, for content, or for each: one image, n for n images, or n lists of R.
        The tokens of R references are averaged by `weights`, which sum to 1 (as released), or concatenated in the
        softmax ("concat"). A set with one reference for each image takes no weights.

        strength: m, of both sets unless content_strength is set. With acts="keys-values" (as released) m = 0 leaves
        empty tokens in the softmax; with "attention" m weighs the attention to them, and 0 is the base model. empty:
        what replaces a missing set. content_prompt: another prompt for the content layers.
        """
        check_arguments(strength, placing, LayerPlacing)
        where, mask = placing.get("where"), placing.get("mask")
        check_choices(acts, empty, combine, strength, content_strength)
        pipe = self._pipe[0]
        if pipe is None:
            raise ValueError("This adapter is not bound to a pipeline. Use DEADiff.load(name, pipe).")
        sources: dict[Name, References] = {
            name: r for name, r in zip(SETS, (style, content), strict=True) if r is not None
        }
        with torch.no_grad():
            weighed = [n for n, r in sources.items() if len(grouped(r, f"{n} references")[0]) > 1] or list(sources)
            tokens: dict[Name, Tensor] = {
                n: self.combined(n, r, combine, weights if n in weighed else None) for n, r in sources.items()
            }
            text = None
            if content_prompt is not None:
                prompts = [content_prompt] if isinstance(content_prompt, str) else list(content_prompt)
                text = pipe.encode_text(prompts).tokens
            reference = self.reference(
                tokens,
                strength={"style": strength, "content": strength if content_strength is None else content_strength},
                empty=empty,
                content_layers=content_layers,
                where=None if where is None else Where.of(where),
            )
        return replace(
            reference,
            weighed=acts,
            when=When.of(placing.get("when")),
            content_text=text,
            mask=None if mask is None else load_masks(mask).to(pipe.device),
            source={name: pipe.describe_source(r) for name, r in sources.items()},
            arguments={
                "empty": empty,
                "combine": combine,
                "weights": None if weights is None else list(weights),
                "content_layers": None if content_layers is None else list(content_layers),
                "content_prompt": content_prompt,
                "where": None if where is None else list(Where.of(where).patterns),
            },
        )

    def combined(self, name: Name, reference: References, combine: Combine, weights: Sequence[float] | None) -> Tensor:
        """Tokens of n references, (n, T, width), or (n, R T, width) for R of each image side by side."""
        groups = grouped(reference, f"{name} references")
        images = torch.stack([self.read(source) for group in groups for source in group])
        tokens = self.tokens(name, images.to(next(self.parameters()).device)).unflatten(0, (len(groups), -1))
        if combine == "concat":
            if weights is not None:
                raise ValueError('weights are for combine="mean"; with "concat" every reference has its own keys.')
            return tokens.flatten(1, 2)
        count = tokens.shape[1]
        shares = [1 / count] * count if weights is None else list(weights)
        if len(shares) != count or abs(sum(shares) - 1) > 1e-4:
            raise ValueError(f"weights must be {count} numbers that sum to 1; found {shares}.")
        return torch.einsum("nrtc,r->ntc", tokens, tokens.new_tensor(shares))

    def read(self, source: ImageSource) -> Tensor:
        """An image as the released script reads it: (3, size, size) in [-1, 1], resized by Pillow's bicubic."""
        side = self.tower.size
        image = load_image(source).resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class DEADiffReference(Control):
    """K', V' (n, T, dim) of every layer that takes tokens, and the set it takes them from. `weight` (0-d each), `text`
    and `regions` are set for a run."""

    kv: dict[str, tuple[Tensor, Tensor]]
    table: dict[str, Name]
    adapter: DEADiff
    strength: dict[Name, float]
    weighed: Acts = "keys-values"
    when: When = field(default_factory=When)
    content_text: Tensor | None = None
    mask: Tensor | None = None
    source: dict[str, list] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)  # for the recipe
    weight: dict[Name, Tensor] | None = None
    text: dict[str, tuple[Tensor, Tensor]] | None = None  # text keys and values of the content layers
    regions: dict[int, Tensor] | None = None  # number of queries -> log region (B, 1, N, 1)

    def prepare(self, run: Run) -> DEADiffReference:
        check_layers(run, self.kv)
        mask = None if self.mask is None else match_batch(self.mask, run.batch, "mask")
        kv = {
            p: tuple(match_batch(x.to(run.pooled.dtype), run.batch, "DEADiff") for x in pair)
            for p, pair in self.kv.items()
        }
        text = regions = None
        if mask is not None:
            regions = log_regions(mask, run.grid)  # raises for another aspect ratio even if the mask is 1 everywhere
            kv = kv if mask.any() else {}  # acts nowhere: bit-equal to its absence
        if self.content_text is not None:
            all_text = cast("UNet", run.backbone).text_keys_values(self.content_text)
            content = [path for path, name in self.table.items() if name == "content"]
            text = {p: tuple(match_batch(x, run.batch, "content_prompt") for x in all_text[p]) for p in content}
        whole = mask is None or bool((mask == 1).all())
        return replace(self, kv=kv, text=text, regions=None if whole else regions)

    def at(self, step: Step) -> DEADiffReference | None:
        factor = self.when.factor(step)
        off = factor == 0 or (self.weighed == "attention" and not any(self.strength.values()))
        at = next((k.device for k, _ in self.kv.values()), None)  # made there: a copy would wait for the device
        weight = {name: torch.full((), float(factor * m), device=at) for name, m in self.strength.items()}
        return None if off else replace(self, weight=weight)

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.site.kind != "cross" or call.site.path not in self.kv:
            return attend(call)
        if self.text is not None and call.site.path in self.text:
            k, v = self.text[call.site.path]
            call = replace(call, k=k, v=v)
        k, v = (split_heads(x.to(call.k), call.q.shape[1]) for x in self.kv[call.site.path])
        log_weight = None if self.regions is None else self.regions[call.q.shape[2]]
        if self.weight is not None:
            m = self.weight[self.table[call.site.path]].to(k)
            if self.weighed == "attention":
                log_weight = m.log() if log_weight is None else m.log() + log_weight
            else:
                k, v = (k * m if self.weighed == "keys-values" else k), v * m
        return attend(call.append_kv(k, v, log_weight))

    def negative(self) -> DEADiffReference:
        """Zeros for both sets, as released; text layers read the negative prompt."""
        kv = {path: (torch.zeros_like(k[:1]), torch.zeros_like(v[:1])) for path, (k, v) in self.kv.items()}
        return replace(self, kv=kv, content_text=None)

    def describe(self) -> dict:
        return {
            "method": "DEADiff",
            "adapter": self.adapter.name,
            "hash": self.adapter.hash,
            "strength": dict(self.strength),
            "acts": self.weighed,
            "when": [self.when.start, self.when.end],
            "masked": self.mask is not None,
            "reference": self.source,
            **self.arguments,
        }
