"""`condit.load`: a name, a folder or a file -> the pipeline that generates with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from condit.drawing.pipeline import Offload, Pipeline
from condit.weights.class_models import ClassParts, PixelParts
from condit.weights.latent_models import LatentParts
from condit.weights.load import check_options, identify, load_parts
from condit.weights.parts import Parts
from condit.weights.quantise import Quantise


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
    """A pipeline by name ("tiny", "sd15", "dit-xl-2-256", ...), from a folder or from a single file; the tables in
    `condit.weights.load` list what there is. FLUX.1 gives a `Pipeline`, Stable Diffusion and PixArt a `LatentPipeline`,
    DiT and DiffiT a `ClassPipeline`, an image-space DiffiT a `PixelPipeline`, ViT a `ViTPipeline`.

    vae: for DiT and DiffiT, an autoencoder, its folder, or "tiny" for the embedded one; None: the folder `vae` next to
    the weights. components: for a single file of FLUX.1, the folder of text encoders, tokenizers and autoencoder; None:
    the file's own. offload: see `Pipeline`. quantize: see `condit.weights.quantise`; the weights of FLUX's blocks then
    take one byte each. ValueError for an option that the model does not take."""
    model = identify(source)
    check_options(model, offload=offload)
    parts = load_parts(model, dtype=dtype, device=device, vae=vae, components=components, quantize=quantize)
    # A pipeline is imported when it is needed: imports take seconds.
    if isinstance(parts, Parts):
        return Pipeline(parts, offload=offload).to(device)
    if isinstance(parts, LatentParts):
        from condit.drawing.latent_pipeline import LatentPipeline

        return LatentPipeline(parts).to(device)
    if isinstance(parts, ClassParts):
        from condit.drawing.class_pipeline import ClassPipeline

        return ClassPipeline(parts).to(device)
    if isinstance(parts, PixelParts):
        from condit.drawing.pixel_pipeline import PixelPipeline

        return PixelPipeline(parts).to(device)
    from condit.drawing.classifier import ViTPipeline

    return ViTPipeline(parts).to(device)
