"""`condit.load`: a name, a folder, a file or a repository -> the pipeline that generates with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from condit.drawing.classifier import ViTPipeline
from condit.drawing.pipeline import Offload, Pipeline
from condit.nn.offload import check_device
from condit.weights.class_models import ClassifierParts
from condit.weights.load import check_options, identify, load_parts
from condit.weights.quantise import Quantise


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    vae: Any = None,
    components: str | Path | None = None,
    offload: Offload | None = None,
    quantize: Quantise | None = None,
    variant: str | None = None,
) -> Any:  # a Pipeline or a ViTPipeline, by the source
    """A pipeline by name ("tiny", "sd15", "dit-xl-2-256", ...), from a folder, from a single file, or from a hub
    ("owner/name[@revision][/file]", docs/hub.md); the tables in `condit.weights.load` list the names. A ViT
    gives a `ViTPipeline`, everything else a `Pipeline`.

    torch_dtype: another name of dtype. vae: for DiT and DiffiT, an autoencoder, its folder, or "tiny" for the
    embedded one; None: the folder `vae` next to the weights. For Stable Diffusion an autoencoder, its folder or file,
    instead of the model's own. components: for a single file of FLUX.1, the folder of
    text encoders, tokenizers and autoencoder; None: the file's own. offload: see `Pipeline`. quantize: see
    `condit.weights.quantise`; the weights of FLUX's blocks then take one byte each. variant: which weights of a
    repository are downloaded ("fp16"), where it has them. Raises ValueError for an option that the model does not
    take."""
    check_device(device)
    model = identify(source, variant)
    check_options(model, offload=offload)
    dtype = dtype or torch_dtype
    parts = load_parts(model, dtype=dtype, device=device, vae=vae, components=components, quantize=quantize)
    if isinstance(parts, ClassifierParts):
        return ViTPipeline(parts).to(device)
    return Pipeline(parts, offload=offload).to(device)
