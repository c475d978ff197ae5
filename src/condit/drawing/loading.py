"""`condit.load`: a name, a folder or a file -> the pipeline that draws with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from condit.drawing.pipeline import Offload, Pipeline
from condit.weights import class_models, latent_models
from condit.weights.load import load_latent_parts, load_parts
from condit.weights.quantise import Quantise, quantise


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vae: Any = None,
    components: str | Path | None = None,
    offload: Offload | None = None,
    quantize: Quantise | None = None,
) -> Any:
    """A `Pipeline`, or a `ViTPipeline` of a ViT: by name ("tiny" and others of `condit models` are embedded; published are
    "sd15", "sdxl", "dit-xl-2-256", ...), from a folder in diffusers' layout (FLUX.1, Stable Diffusion, PixArt), or from a
    file or folder of FLUX.1, Stable Diffusion, DiT, DiffiT or ViT.

    vae: an autoencoder, its folder, or "tiny" for the embedded one, for a class model that has none beside it.
    components: for a single file of FLUX.1, the folder of text encoders, tokenizers and autoencoder; None: its own.
    offload: see `Pipeline`. quantize: see `condit.weights.quantise`; weights of FLUX's blocks take one byte each."""
    latent = latent_models.recognise(source)
    if latent is not None:
        if any(given is not None for given in (vae, components, offload, quantize)):
            raise ValueError(
                f"vae=, components=, offload= and quantize= have no use with {str(source)!r}, which is not FLUX.1 or a "
                "class model. Leave them out."
            )
        half = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        return Pipeline(load_latent_parts(latent, dtype=dtype or half)).to(device)
    found = class_models.recognise(source)
    if vae is not None and (found is None or found[0] not in ("dit", "diffit")):
        raise ValueError(f"vae= is for DiT and DiffiT; {str(source)!r} brings its own or needs none. Leave it out.")
    if found is None:
        parts = load_parts(source, dtype=dtype, components=components)
        if quantize is not None:
            quantise(parts.backbone, quantize)
        return Pipeline(parts, offload=offload).to(device)
    given = {"components": components, "offload": offload, "quantize": quantize}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{wrong[0]}= is for FLUX.1; {str(source)!r} is a {found[0]}. Leave it out.")
    kind, path = found
    if kind == "vit":
        from condit.drawing.classifier import ViTPipeline

        return ViTPipeline(class_models.load_classifier_parts(str(source), path, dtype=dtype)).to(device)
    if kind == "diffit-image":
        return Pipeline(class_models.load_pixel_parts(str(source), path, dtype=dtype)).to(device)
    return Pipeline(class_models.load_class_parts(str(source), kind, path, vae=vae, dtype=dtype)).to(device)
