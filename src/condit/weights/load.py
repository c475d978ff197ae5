"""Names and folders to the parts of a pipeline: the one place that knows every backbone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from condit.encoders.image import TinyImage
from condit.weights.catalog import MODELS, describe_hash
from condit.weights.class_models import PUBLISHED, looks_like
from condit.weights.flux import is_flux_file, load_flux, load_flux_file, load_mmdit
from condit.weights.latent_models import PUBLISHED as LATENT
from condit.weights.latent_models import LatentModel, LatentParts
from condit.weights.original_sd import load_original
from condit.weights.parts import Parts
from condit.weights.pixart import load_pixart
from condit.weights.stable_diffusion import load_stable_diffusion
from condit.weights.tiny import floats, load_latent, load_text
from condit.weights.tiny_pixart import load_tiny_pixart
from condit.weights.tiny_unet import load_tiny_unet

__all__ = ["Parts", "load_latent_parts", "load_mmdit", "load_parts", "load_tiny"]


def load_parts(source: str | Path, *, dtype: torch.dtype | None = None, components: str | Path | None = None) -> Parts:
    """An embedded model by name, a folder in diffusers' FLUX layout, or a single file of FLUX.1's transformer in its
    authors' names; `components` is the folder of the parts that such a file lacks, by default its own."""
    name = str(source)
    if name in MODELS and MODELS[name].kind == "model":
        found = load_tiny(name, MODELS[name].path, dtype or torch.float32)
    elif (Path(source) / "model_index.json").is_file():
        found = load_flux(Path(source), dtype or torch.bfloat16)
    elif Path(source).is_file() and is_flux_file(Path(source)):
        return load_flux_file(Path(source), components or Path(source).parent, dtype or torch.bfloat16)
    else:
        known = ", ".join([*(n for n, e in MODELS.items() if e.kind == "model"), *LATENT, *PUBLISHED])
        raise ValueError(
            f"No model {name!r}.{looks_like(Path(source))} Known: {known}; or give a folder with model_index.json "
            "(diffusers' FLUX, Stable Diffusion or PixArt layout), a single file of FLUX.1 (flux1-dev.safetensors), "
            "or a file or folder of Stable Diffusion, DiT, DiffiT or ViT. For FLUX.1 weights download the repository "
            "first and pass its folder."
        )
    if components is not None:
        raise ValueError(f"components= is for a single file of FLUX.1; {name!r} brings its own. Leave it out.")
    return found


def load_latent_parts(model: LatentModel, *, dtype: torch.dtype) -> LatentParts:
    """A text-to-image model over latents that `latent_models.recognise` has found."""
    if model.kind == "pixart":
        return load_pixart(model.path, dtype, model.name)
    if model.kind == "icon-pixart":
        return load_tiny_pixart(model.path, dtype, model.name)
    if model.kind == "icon-unet":
        return load_tiny_unet(model.path, dtype, model.name)
    if model.kind == "stable-diffusion-file":
        return load_original(model.path, dtype, model.name)
    return load_stable_diffusion(model.path, dtype, model.name)


def load_tiny(name: str, folder: Path, dtype: torch.dtype) -> Parts:
    """The embedded text-to-icon model."""
    text = load_text(folder)
    raw = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    backbone = load_mmdit(folder / "transformer", floats)
    return Parts(
        name=name,
        hash=describe_hash(folder),
        backbone=backbone.to(dtype),
        text=text,
        vae=load_latent(folder / "vae"),
        image=TinyImage(text.clip).eval(),
        prediction=raw["condit"]["prediction"],
        shift=raw["condit"]["shift"],
        eta=raw["condit"].get("eta", 0.0),
        size=(128, 128),
        steps=20,
        guidance=3.0,
        distilled=False,
    )
