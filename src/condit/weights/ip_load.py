"""IP-Adapters of files, our own for an MM-DiT and published ones (arXiv:2308.06721): checked against a model, whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from condit.controls.control import Where
from condit.controls.host import Host
from condit.controls.ip_input import IPConfig
from condit.controls.ip_projectors import IPParts, Layer, TimeResampler, layers_of
from condit.encoders.image import CLIPImage
from condit.weights.hub_files import encoder_beside, local_folder
from condit.weights.ip_files import face_lora, fit_layers, form_of, read_layout
from condit.weights.ip_projectors import Needs, encoder_size, needs_of, projector_of


def ip_parts(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: object,
    pipe: Host,
    image_encoder: CLIPImage | str | Path | None,
    where: Where,
    head_dim: int,
) -> IPParts:
    """What `IPAdapter.load` builds from a file; for the arguments see there. ValueError for a file of another base, or
    for another encoder."""
    sites = pipe.backbone.sites
    published = any(s.kind == "cross" for s in sites) or any("ip_adapter_double_stream" in n for n in tensors)
    if published or "ip_adapter.0.to_k_ip.bias" in tensors:
        return published_parts(tensors, source, pipe, image_encoder, where, head_dim)
    return own_parts(tensors, config, source, pipe)


def own_parts(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: object, pipe: Host) -> IPParts:
    """Our adapters for an MM-DiT (docs/tiny.md)."""
    if "ip_adapter.1.to_k_ip.weight" in tensors and "ip_adapter.0.to_k_ip.weight" not in tensors:
        raise ValueError(
            f"{source} is an IP-Adapter of a UNet, whose K', V' are numbered 1, 3, ...; {pipe.name} is an MM-DiT. Load "
            "it for a Stable Diffusion, as condit.load gives one."
        )
    for name in ("image_proj.proj.weight", "image_proj.norm.weight", "ip_adapter.0.to_k_ip.weight"):
        if name not in tensors:
            raise ValueError(
                f"{source}: no {name!r}; its first tensor is {next(iter(tensors))!r}. Read for an MM-DiT are our "
                "own adapters and XLabs' FLUX files; InstantX's are not."
            )
    others = [name for name in tensors if not name.startswith(("image_proj.", "ip_adapter."))]
    if others:
        raise ValueError(
            f"{source} holds {others[0]!r}; expected image_proj.* and ip_adapter.* alone. An adapter that also shifted "
            "the pooled text (pooled_proj) is no longer read: train it again, or take the tensor out of the file."
        )
    rows, features = tensors["image_proj.proj.weight"].shape
    dim = len(tensors["image_proj.norm.weight"])
    width = tensors["ip_adapter.0.to_k_ip.weight"].shape[0]
    pairs, sites = sum(n.endswith(".to_k_ip.weight") for n in tensors), pipe.backbone.sites
    if (pairs, width) != (len(sites), pipe.backbone.config.dim):
        raise ValueError(
            f"{source} has {pairs} K', V' pairs of width {width}; {pipe.name} has {len(sites)} attention layers of "
            f"width {pipe.backbone.config.dim}. Was it made for another model?"
        )
    if pipe.image is None or pipe.image.features != features:
        found = "no image encoder" if pipe.image is None else f"an image encoder of width {pipe.image.features}"
        raise ValueError(f"{source} needs image features of width {features}; {pipe.name} has {found}.")
    heads = pipe.backbone.config.num_attention_heads
    config = IPConfig(features, rows // dim, dim, heads, settings.get("combine", "mean"))
    layers = [Layer(i, site.path, width, heads) for i, site in enumerate(sites)]
    return IPParts(config, layers, {name: tensor.float() for name, tensor in tensors.items()})


def published_parts(
    tensors: Mapping[str, Tensor],
    source: object,
    pipe: Host,
    image_encoder: CLIPImage | str | Path | None,
    where: Where,
    head_dim: int,
) -> IPParts:
    """A published file for a UNet or FLUX."""
    layout, backbone = read_layout(tensors, source), pipe.backbone
    if layout.others:
        raise ValueError(f"{source} holds {next(iter(layout.others))!r}, which is no part of an IP-Adapter.")
    form = form_of(layout, backbone.sites)
    layers = layers_of(backbone, backbone.sites, form)
    width = backbone.config.cross_attention_dim if form == "cross" else backbone.config.joint_attention_dim
    kept = fit_layers(layout, layers, width, where, source, pipe.name)
    if not kept:
        raise ValueError(f"{source}: none of its layers is in where={where.patterns}.")
    projector = projector_of(layout.projector, head_dim)
    if isinstance(projector, TimeResampler):
        raise ValueError(f"{source} is an adapter of SD 3.5, which {pipe.name} is not.")
    needs = needs_of(projector)
    encoder = find_encoder(pipe, image_encoder, source, needs) if needs.width else None
    dim = layout.text_width
    tokens = getattr(projector, "tokens", 0)
    config = IPConfig(needs.width, tokens, dim, combine="concat", form=form, feature=needs.feature)
    present = [layer for layer in layers if layer.number in kept]
    absent = [layer for layer in layers if layer.number not in kept]
    named = {f"image_proj.{n}": t for n, t in layout.projector.items()}
    named |= {f"ip_adapter.{n}.{part}": t for n, parts in kept.items() for part, t in parts.items()}
    attentions = tuple(site.path for site in backbone.sites) if layout.lora else ()
    lora = face_lora(layout.lora, attentions, backbone, source) if layout.lora else None
    return IPParts(config, present, named, projector, absent, encoder, lora, attentions)


def find_encoder(pipe: Host, given: CLIPImage | str | Path | None, source: object, needs: Needs) -> CLIPImage | None:
    """The image encoder: given, the pipeline's, or beside the file. Its size is checked before its weights are read."""
    if isinstance(given, CLIPImage):
        needs.refuse(given.size, source, "the image encoder given")
        return given
    if given is None and isinstance(pipe.image, CLIPImage):
        needs.refuse(pipe.image.size, source, f"the image encoder of {pipe.name}")
        return pipe.image
    folder = local_folder(given) if given is not None else encoder_beside(source)
    own = {"embeds": "features", "hidden": "states"}.get(needs.feature)
    if folder is None and pipe.image is not None and own and getattr(pipe.image, own) == needs.width:
        return None  # an encoder of the pipeline's own
    if folder is None:
        return needs.refuse(None, source, pipe.name)
    needs.refuse(encoder_size(folder), source, folder)
    return pipe.image_encoder(folder)
