"""The projector of an IP-Adapter's file, recognised by its tensors, and the image encoder that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condit.controls.ip_input import Feature
from condit.controls.ip_projectors import (
    HEAD_DIM,
    FullProjection,
    IdentityPlusProjection,
    IdentityProjection,
    ImageProjection,
    Perceiver,
    Resampler,
    TimeResampler,
)
from condit.encoders.image import EncoderSize, encoders_of
from condit.weights.files import Json
from condit.weights.folders import read_json


def projector_of(tensors: Mapping[str, Tensor], head_dim: int = HEAD_DIM) -> nn.Module:
    """The projector of these tensors (without `image_proj.`), sizes from their shapes, strictly loaded. head_dim: of a
    Perceiver. ValueError for tensors of no projector that is known here."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # On the meta device: what is built here is filled by the file a moment later.
    with torch.device("meta"):
        if "time_embedding.linear_1.weight" in shape:
            found: nn.Module = _time_resampler(shape, head_dim)
        elif "latents" in shape:
            found = _resampler(shape, head_dim)
        elif "perceiver_resampler.proj_in.weight" in shape:
            perceiver = {name.removeprefix("perceiver_resampler."): s for name, s in shape.items()}
            found = IdentityPlusProjection(_identity(shape), Perceiver(**_sizes(perceiver, HEAD_DIM)))
        elif "proj.3.weight" in shape:
            found = FullProjection(shape["proj.0.weight"][1], shape["proj.2.weight"][0])
        elif "proj.2.weight" in shape and "norm.weight" in shape:
            found = _identity(shape)
        elif len(shape.get("proj.weight", ())) == 2 and "norm.weight" in shape:
            rows, features = shape["proj.weight"]
            (dim,) = shape["norm.weight"]
            found = ImageProjection(features, dim, rows // dim)
        else:
            first = next(iter(shape), "nothing")
            raise ValueError(f"no projector known here: expected proj, latents or perceiver_resampler; found {first!r}")
    wanted = {name: tuple(value.shape) for name, value in found.state_dict().items()}
    if wanted != shape:
        wrong = sorted(n for n in {*wanted, *shape} if wanted.get(n) != shape.get(n))
        raise ValueError(
            f"projector {type(found).__name__}: {len(wrong)} tensors do not fit (first: {wrong[0]!r}, expected "
            f"{wanted.get(wrong[0])}, found {shape.get(wrong[0])})"
        )
    found.load_state_dict(dict(tensors), strict=True, assign=True)
    return found


Shapes = Mapping[str, tuple[int, ...]]


def _identity(shape: Shapes) -> IdentityProjection:
    (hidden, features), (rows, _), (dim,) = shape["proj.0.weight"], shape["proj.2.weight"], shape["norm.weight"]
    return IdentityProjection(features, hidden, dim, rows // dim)


def _sizes(shape: Shapes, head_dim: int) -> dict[str, int]:
    """Of a Perceiver in the official names."""
    inner = shape["layers.0.0.to_q.weight"][0]
    return {
        "features": shape["proj_in.weight"][1],
        "dim": shape["proj_in.weight"][0],
        "out": shape["proj_out.weight"][0],
        "inner": inner,
        "heads": _heads(inner, head_dim),
        "depth": sum(name.endswith(".0.to_q.weight") for name in shape),
        "hidden": shape["layers.0.1.1.weight"][0],
    }


def _resampler(shape: Shapes, head_dim: int) -> Resampler:
    pooled, dim = shape.get("to_latents_from_mean_pooled_seq.1.weight", (0,))[0], shape["latents"][2]
    positions = shape.get("pos_emb.weight", (0,))[0]
    queries = shape["latents"][1]
    return Resampler(**_sizes(shape, head_dim), queries=queries, positions=positions, pooled=pooled // dim)


def _time_resampler(shape: Shapes, head_dim: int) -> TimeResampler:
    inner = shape["layers.0.attn.to_q.weight"][0]
    return TimeResampler(
        features=shape["proj_in.weight"][1],
        dim=shape["proj_in.weight"][0],
        out=shape["proj_out.weight"][0],
        queries=shape["latents"][1],
        inner=inner,
        heads=_heads(inner, head_dim),
        depth=sum(name.endswith(".attn.to_q.weight") for name in shape),
        hidden=shape["layers.0.ff.net.0.proj.weight"][0],
        t=shape["time_embedding.linear_1.weight"][1],
    )


def _heads(inner: int, head_dim: int) -> int:
    if inner % head_dim:
        raise ValueError(
            f"a Perceiver of inner width {inner} has no heads of {head_dim}. Published ones have {HEAD_DIM}; for "
            "another give head_dim="
        )
    return inner // head_dim


# What an encoder must give


@dataclass(frozen=True)
class Needs:
    """The feature that a projector reads: a pooled vector after CLIP's projection ("embeds"), the penultimate layer's
    states ("hidden"), a face vector ("identity"), or the last two; width of what the image encoder gives, 0 for none;
    tokens: how many states (full-face), None for any."""

    feature: Feature
    width: int
    tokens: int | None = None

    def fits(self, size: EncoderSize) -> bool:
        if self.width == 0:
            return True
        found = size.projection if self.feature == "embeds" else size.hidden
        return found == self.width and self.tokens in (None, size.tokens)

    def refuse(self, size: EncoderSize | None, source: object, found: object) -> None:
        """ValueError unless an encoder of this size fits. 1280 is two things: ViT-H/14's states, bigG/14's vector."""
        if self.width == 0 or (size is not None and self.fits(size)):
            return
        what = "image embeddings (after CLIP's projection)" if self.feature == "embeds" else "penultimate hidden states"
        names = encoders_of(self.width, "projection" if self.feature == "embeds" else "hidden")
        needed = f"{what} of width {self.width}" + (f": image encoder {names}" if names else "")
        given = f"{found} is {size.describe()}" if size is not None else f"{found} has none"
        raise ValueError(
            f"{source} needs {needed}; {given}. Give image_encoder=, the folder of the right one (h94/IP-Adapter: "
            "models/image_encoder is ViT-H/14, sdxl_models/image_encoder is bigG/14)."
        )


def needs_of(projector: nn.Module) -> Needs:
    """What a projector reads."""
    if isinstance(projector, ImageProjection):
        return Needs("embeds", projector.proj.in_features)
    if isinstance(projector, FullProjection):
        first: Any = projector.proj[0]
        return Needs("hidden", first.in_features)
    if isinstance(projector, Resampler | TimeResampler):
        return Needs("hidden", projector.proj_in.in_features)
    if isinstance(projector, IdentityPlusProjection):
        return Needs("identity+hidden", projector.perceiver_resampler.proj_in.in_features)
    if isinstance(projector, IdentityProjection):
        return Needs("identity", 0)
    raise ValueError(f"{type(projector).__name__} is no projector of IP-Adapter.")


def vision_config(folder: str | Path) -> Json:
    """The settings in config.json of an image tower or of a whole CLIP. ValueError without one, or for another
    model."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; expected the folder of a CLIP image encoder.")
    config = read_json(file)
    inner = {**config.get("vision_config", config)}
    inner.setdefault("projection_dim", config.get("projection_dim", 512))
    if config.get("vision_config") is not None:
        inner["projection_dim"] = config.get("projection_dim", 512)
    if "clip" not in str(config.get("model_type", "clip")):
        raise ValueError(f"{folder} is a {config['model_type']}; expected a CLIP image encoder.")
    return inner


def encoder_size(folder: str | Path) -> EncoderSize:
    """Sizes from config.json alone, before weights are read."""
    c = vision_config(folder)
    side, patch = c.get("image_size", 224), c.get("patch_size", 32)
    return EncoderSize(c.get("hidden_size", 768), c["projection_dim"], (side // patch) ** 2 + 1, side)
