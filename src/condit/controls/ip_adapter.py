"""IP-Adapter: text-compatible image prompts through decoupled attention (Ye et al. 2023, arXiv:2308.06721).

    z_t + lambda * softmax(q K'^T / sqrt(d)) V'        (Eq. 5), in front of the output projection

q and z_t are the frozen layer's; K', V' are made from the reference alone. On UNets every attention to the text gets
them, as published. On an MM-DiT the image rows do, with q before rotary positions and K' normalised; XLabs' FLUX files
add after each double block instead. This file has the adapter, `ip_reference.py` the control, `ip_input.py` the inputs
of a call, `ip_projectors.py` the modules, `instantstyle.py` the choice of blocks. `weights/` reads published files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls import publish
from condit.controls.control import (
    Control,
    MaskMode,
    Placing,
    When,
    Where,
    check_arguments,
    check_reach,
    finite,
    one_of,
)
from condit.controls.host import Host, save_adapter, within
from condit.controls.ip_input import (
    Combine,
    Features,
    IPConfig,
    ReferenceInputs,
    References,
    check_prefixes,
    combined,
    each_token,
    grouped,
    read_features,
    reference_masks,
    times,
    zeros_of,
)
from condit.controls.ip_projectors import HEAD_DIM, ImageProjection, KeyValue, Layer, layers_of
from condit.controls.ip_reference import IPReference, KeyValues, Scaling, Strength, WithLoRA, any_site, strength_at
from condit.controls.wrap import Together
from condit.data.images import load_image
from condit.encoders.image import CLIPImage, Fit, TinyImage
from condit.nn.attention import Site, split_heads
from condit.nn.lora import LoRA, weighted

if TYPE_CHECKING:
    from condit.backbones.unet import UNet
    from condit.data.images import ImageSource

__all__ = ["IPAdapter", "IPConfig", "IPReference"]


class IPPlacing(Placing, total=False):
    """scaling: how lambda acts. mask_mode: how a mask is reduced to the token grid. fit: of an image to the encoder's
    square. lora_scale: of FaceID's LoRA. one_graph: every choice of blocks compiles to the same graph, at the cost of
    acting everywhere."""

    scaling: Scaling
    mask_mode: MaskMode
    fit: Fit
    lora_scale: float
    one_graph: bool


class IPAdapter(nn.Module):
    """An adapter: projector and one K', V' pair a site. Published: `image_proj.*`, `ip_adapter.N.to_k_ip.weight`."""

    def __init__(
        self,
        config: IPConfig,
        sites: Sequence[Site | Layer],
        width: int = 0,
        pipe: Host | None = None,
        *,
        projector: nn.Module | None = None,
        absent: Sequence[Layer] = (),
    ):
        """sites: the layers with K', V'; width: of each, if they do not say. absent: layers that may have K', V' but do
        not. V' starts at zero, so that training starts at the base model."""
        super().__init__()
        self.config, self.name, self.hash = config, "", ""
        self.layers = tuple(
            s if isinstance(s, Layer) else Layer(i, s.path, width, config.heads) for i, s in enumerate(sites)
        )
        self.absent = tuple(absent)
        self.image_proj = projector or ImageProjection(config.features, config.dim, config.tokens)
        bias = config.form == "residual"
        self.ip_adapter = nn.ModuleDict({str(x.number): KeyValue(config.dim, x.width, bias=bias) for x in self.layers})
        self.lora: LoRA | None = None  # FaceID's
        self.attentions: tuple[str, ...] = ()  # paths of all attention layers, which number that LoRA
        self._pipe: list[Host | None] = [pipe]  # in a list: the pipeline's weights are not ours
        self._encoder: list[CLIPImage | None] = [None]
        for pair in self.pairs:
            nn.init.zeros_(pair.to_v_ip.weight)

    @property
    def pairs(self) -> list[KeyValue]:
        """K' and V' of each of `layers`."""
        return cast("list[KeyValue]", list(self.ip_adapter.values()))

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the layers that have K', V'."""
        return tuple(layer.path for layer in self.layers)

    # Made, loaded, saved

    @classmethod
    def new(
        cls,
        pipe: Host | nn.Module,
        config: IPConfig,
        *,
        projector: nn.Module | None = None,
        where: Where | str | tuple | None = None,
    ) -> IPAdapter:
        """An adapter to train on a UNet: K', V' are copies of the text's K, V of their layers (section 3.2.2). where:
        these layers only. pipe: a pipeline, or a UNet."""
        chosen, bound = Where.of(where), None if isinstance(pipe, nn.Module) else pipe
        backbone = cast("UNet", pipe if bound is None else bound.backbone)
        layers = layers_of(backbone, backbone.sites, "cross")
        kept = [layer for layer in layers if any_site(chosen, layer.path)]
        absent = [layer for layer in layers if layer not in kept]
        adapter = cls(replace(config, form="cross"), kept, pipe=bound, projector=projector, absent=absent)
        with torch.no_grad():
            for layer, pair in zip(kept, adapter.pairs, strict=True):
                pair.to_k_ip.weight.copy_(backbone.get_parameter(f"{layer.path}.to_k.weight"))
                pair.to_v_ip.weight.copy_(backbone.get_parameter(f"{layer.path}.to_v.weight"))
        return adapter

    @classmethod
    def load(
        cls,
        source: str | Path,
        pipe: Host,
        *,
        subfolder: str = "",
        weight_name: str = "",
        image_encoder: CLIPImage | str | Path | None = None,
        where: Where | str | tuple[str, ...] | None = None,
        head_dim: int = HEAD_DIM,
    ) -> IPAdapter:
        """From a name ("tiny/style"), a published file, a folder, or a name on a hub
        ("h94/IP-Adapter/models/ip-adapter_sd15.safetensors"); its kind and sizes are inferred from the tensors.
        subfolder, weight_name: the file in a folder or repository, as in diffusers.

        image_encoder: an encoder or its folder; None: the pipeline's, or the folder `image_encoder` next to the file.
        Its size is checked before its weights are read. where: load K', V' of these layers only; the others are
        inactive. head_dim: of a "plus" projector's heads, 64 in every published file. Raises ValueError for a file of
        another base model or encoder."""
        source = within(source, subfolder, weight_name)
        file = pipe.adapter_file(source, "IPAdapter")
        parts = file.ip_parts(source, pipe, image_encoder, Where.of(where), head_dim)
        with torch.device("meta"):
            adapter = cls(parts.config, parts.layers, pipe=pipe, projector=parts.projector, absent=parts.absent)
        file.load_into(adapter, parts.tensors, assign=True)
        adapter.lora, adapter.attentions, adapter._encoder[0] = parts.lora, parts.attentions, parts.encoder
        adapter.name, adapter.hash = file.name, file.hash
        return adapter.requires_grad_(False).to(pipe.device, pipe.dtype)

    save = save_adapter

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the published names, with FaceID's LoRA."""
        own = {k: v.detach() for k, v in self.state_dict().items() if not k.startswith("lora.")}
        return own if self.lora is None else own | face_tensors(self.lora, self.attentions)

    def metadata(self) -> dict:
        """The configuration that `load` reads from the file."""
        return {"method": "IPAdapter", **asdict(self.config)}

    save_pretrained, push_to_hub = publish.save_pretrained, publish.push_to_hub

    # From features to keys and values

    def tokens(self, features: Features, shortcut: float | None = None) -> Tensor:
        """Features of B images, or (B, R, ...) of R images each, concatenated -> tokens (B, T or R T, C)."""
        first, flat = features if isinstance(features, tuple) else (features,), 3 if self._states else 2
        many = first[-1].ndim > flat
        rows = [x.flatten(0, 1) if many else x for x in first]
        tokens = self.image_proj(*rows, shortcut) if len(rows) == 2 else self.image_proj(*rows)
        return tokens.unflatten(0, (-1, first[0].shape[1])).flatten(1, 2) if many else tokens

    @property
    def _states(self) -> bool:
        """Whether the features end in (L, H)."""
        return self.config.feature in ("hidden", "identity+hidden")

    @property
    def face_width(self) -> int:
        """Of a face's vector; 0 for an adapter that reads none."""
        if "identity" not in self.config.feature:
            return 0
        return cast("nn.Linear", self.image_proj.get_submodule("proj.0")).in_features

    def project(self, tokens: Tensor, where: Where | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens (B, T, C) -> site path -> K', V', each (B, H, T, D). Computed once a run."""
        pairs = {}
        for layer, pair in zip(self.layers, self.pairs, strict=True):
            if where is not None and not any_site(where, layer.path):
                continue
            k, v = (split_heads(linear(tokens), layer.heads) for linear in (pair.to_k_ip, pair.to_v_ip))
            pairs[layer.path] = (F.rms_norm(k, k.shape[-1:], eps=1e-5) if self.config.form == "joint" else k, v)
        return pairs

    def keys_values(self, features: Features, where: Where | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """`project` of the tokens of features (B, E), or (B, R, E) for R references concatenated."""
        return self.project(self.tokens(features), where)

    def reference(
        self,
        features: Features,
        strength: Strength = 1.0,
        where: Where | None = None,
        *,
        empty: Features | None = None,
        weights: Sequence[float] | None = None,
        against: Where | None = None,
        shortcut: float | None = None,
        one_graph: bool = False,
    ) -> IPReference:
        """A control from features of B references, or (B, R, ...) for R concatenated ones.

        empty: the features of no reference; None: zeros. weights: of each of the R references, on V'. For the other
        arguments see `control`.
        """
        where = where or Where()
        acts = where
        if isinstance(strength, Mapping):
            # A layer at strength 0 is skipped: it gets no K', V'.
            acts = Where(tuple(p for p in self.sites if any_site(where, p) and strength_at(strength, p)))
        kv = self.project(self.tokens(features, shortcut), acts)
        if weights is not None:
            kv = {path: (k, v * each_token(weights, v)) for path, (k, v) in kv.items()}
        nothing = zeros_of(features) if empty is None else empty
        none = self.project(self.tokens(nothing, shortcut), acts)
        if against is not None:  # the reference acts on the negative side, so that guidance leads away from it
            turned = {path for path in kv if any_site(against, path)}
            none = {path: kv[path] if path in turned else pair for path, pair in none.items()}
            kv = {path: pair for path, pair in kv.items() if path not in turned}
        if one_graph:
            kv, none = (self.filled(pairs) for pairs in (kv, none))
            strength = {"": strength} if isinstance(strength, float | int) else strength
        return IPReference(kv=kv, empty=none, adapter=self, strength=strength, where=Where() if one_graph else where)

    def filled(self, pairs: KeyValues) -> dict[str, tuple[Tensor, Tensor]]:
        """K', V' at every site, zeros where none act, so that every choice of blocks compiles to one graph. V' = 0
        adds exactly 0."""
        some = next(iter(pairs.values()))[0]
        all_pairs = {}
        for layer in sorted((*self.layers, *self.absent), key=lambda x: x.number):
            shape = len(some), some.shape[2], layer.width
            # Two tensors: one in two places would be another graph.
            k, v = (split_heads(some.new_zeros(shape), layer.heads) for _ in range(2))
            all_pairs[layer.path] = pairs.get(layer.path, (k, v))
        return all_pairs

    # From images to a control

    def features(self, sources: Sequence[ImageSource], fit: Fit = "crop") -> Tensor:
        """Features of images for the projector: (n, E) or (n, L, H). FaceID's vectors come from a face model
        instead."""
        encoder = self._encoder[0]
        if encoder is None:
            images, own = self._bound().read_images(list(sources), None), self._own_encoder()
            return own.hidden(images) if self._states else own(images)
        pixels = encoder.pixels([load_image(source) for source in sources], fit)
        return encoder.hidden(pixels) if self._states else encoder.embeds(pixels)

    def nothing(self, features: Features) -> Features:
        """The features of no reference, as in the official code: zeros; for hidden states those of a mean-coloured
        image (zeros after normalising); for FLUX those of a black one."""
        encoder = self._encoder[0]
        if isinstance(features, tuple):
            face = features[0]
            return face.new_zeros(1, face.shape[-1]), self._hidden_of_zeros(features[1])
        if self._states:
            return self._hidden_of_zeros(features)
        if self.config.form == "residual" and encoder is not None:
            return encoder.embeds(encoder.black()).to(features)
        return torch.zeros_like(features[:1])

    def _hidden_of_zeros(self, like: Tensor) -> Tensor:
        encoder = self._encoder[0] or self._own_encoder()
        return encoder.hidden(encoder.zeros()).to(like)

    def _own_encoder(self) -> CLIPImage | TinyImage:
        """The image encoder of the pipeline's model."""
        encoder = None if self._pipe[0] is None else self._pipe[0].image
        if encoder is None:
            raise ValueError(f"{self.name} has no image encoder. Load it with image_encoder=, or give embeds=.")
        return encoder

    def control(
        self,
        reference: References | None = None,
        strength: float | Sequence[float] | Mapping[str, float] = 1.0,
        *,
        where: Where | str | tuple[str, ...] | None = None,
        combine: Combine | None = None,
        weights: Sequence[float] | None = None,
        embeds: Tensor | None = None,
        identity: Tensor | None = None,
        shortcut: float | None = None,
        content: Tensor | None = None,
        against: Where | str | tuple[str, ...] | None = None,
        **how: Unpack[IPPlacing],
    ) -> Control:
        """A control from one reference, from n references for n images, or from n lists of R references.

        strength: lambda, any real number; one for each image; or by prefix of the layers' paths
        ("up_blocks.0.attentions.1"), 0 elsewhere. where: the layers at which it acts. With combine="sum" a list of
        masks has one for each of the references of an image.

        combine, for R references of an image: "mean" or "add" of their features; "subtract": the first minus the mean
        of the others; "concat": one softmax over all tokens; "sum": one attention for each, summed. weights: (R,).

        embeds (n, ...) or (n, R, ...): features to use instead of images. identity (n, E) or (n, R, E):
        FaceID's faces; shortcut: None for FaceID-Plus, a number (usually 1) for v2.
        content (E,) or (n, E): subtracted from the features (InstantStyle). against: layers at which the reference acts
        on the negative side instead. how: see IPPlacing.
        """
        check_arguments(strength, how, IPPlacing)
        scaling, mask_mode = how.get("scaling", "V only"), how.get("mask_mode", "area")
        lora_scale = how.get("lora_scale", 1.0)
        chosen = combine or self.config.combine
        one_of("combine", chosen, get_args(Combine))
        one_of("scaling", scaling, get_args(Scaling))
        one_of("mask_mode", mask_mode, get_args(MaskMode))
        if lora_scale != 1 and self.lora is None:
            raise ValueError(f"lora_scale= is for FaceID's LoRA; {self.name or 'this adapter'} has none. Leave it out.")
        check_reach(Where.of(where), self.sites)
        check_prefixes(strength, [layer.path for layer in (*self.layers, *self.absent)])
        groups = None if reference is None else grouped(reference)
        with torch.no_grad():
            inputs = ReferenceInputs(groups, embeds, identity, content, shortcut)
            like, face = next(self.parameters()), self.face_width
            name, read = self.name or "this adapter", partial(self.features, fit=how.get("fit", "crop"))
            features = read_features(inputs, self.config, name, read, like, face)
            parts = combined(features, chosen, weights)
            source = [] if reference is None else self._bound().describe_source(reference)
            masks = reference_masks(how.get("mask"), len(parts), like.device)
            references = [
                self.reference(
                    part,
                    times(strength, weight),
                    Where.of(where),
                    empty=self.nothing(part) if self._states or self.config.form == "residual" else None,
                    weights=weights if chosen == "concat" else None,
                    against=None if against is None else Where.of(against),
                    shortcut=shortcut,
                    one_graph=how.get("one_graph", False),
                )
                for part, weight in parts
            ]
        schedule, more = When.of(how.get("when")), {"source": source, "scaling": scaling, "mask_mode": mask_mode}
        acting = [replace(r, when=schedule, mask=m, **more) for r, m in zip(references, masks, strict=True)]
        made: Control = acting[0] if len(acting) == 1 else Together(tuple(acting))
        if self.lora is None:
            return made
        return WithLoRA(made, self, weighted(self.lora, finite("lora_scale", lora_scale)))

    def _bound(self) -> Host:
        pipe = self._pipe[0]
        if pipe is None:
            raise ValueError("This adapter is not bound to a pipeline. Use IPAdapter.load(name, pipe).")
        return pipe


def face_tensors(lora: LoRA, paths: Sequence[str]) -> dict[str, Tensor]:
    """FaceID's LoRA in the published names: N the place among all attention layers `paths`."""
    number = {path: i for i, path in enumerate(paths)}
    tensors = {}
    for path, key in lora.keys.items():
        layer, part = path.removesuffix(".0").rsplit(".", 1)
        prefix = f"ip_adapter.{number[layer]}.{part}_lora"
        tensors[f"{prefix}.down.weight"], tensors[f"{prefix}.up.weight"] = lora.a[key].detach(), lora.b[key].detach()
    return tensors
