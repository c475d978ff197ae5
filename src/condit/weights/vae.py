"""Autoencoders from folders: diffusers' AutoencoderKL, or condit's own patch code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from condit.weights.catalog import MODELS
from condit.weights.tiny import load_latent


def load_vae(source: str | Path) -> Any:
    """A frozen autoencoder in float32: "tiny" for the embedded one, its folder, or a folder that holds it as `vae`.
    Strict: ValueError where tensors are missing."""
    folder = MODELS["tiny"].path if str(source) == "tiny" and "tiny" in MODELS else Path(source)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no autoencoder (no config.json). Expected: 'tiny', an exported `PatchAutoencoder`, or the "
            "`vae` folder of a Stable Diffusion as diffusers saves it."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("_class_name", "PatchAutoencoder" if "patch" in config else "AutoencoderKL")
    if kind == "PatchAutoencoder":
        return load_latent(folder).requires_grad_(False)
    if kind != "AutoencoderKL":
        raise ValueError(f"{folder} holds a {kind}; a PatchAutoencoder or an AutoencoderKL is expected.")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae, told = AutoencoderKL.from_pretrained(folder, local_files_only=True, output_loading_info=True)  # type: ignore[misc]
    if told["missing_keys"]:  # diffusers only warns, and fills them with chance
        raise ValueError(f"{folder} misses {len(told['missing_keys'])} tensors (first: {told['missing_keys'][0]}).")
    return vae.float().eval().requires_grad_(False)
