"""A CLIP image tower from its folder, as h94/IP-Adapter ships it (`image_encoder/`), or out of a whole CLIP."""

from __future__ import annotations

from pathlib import Path

import torch

from condit.encoders.image import CLIPImage, vision_config
from condit.weights.files import load_strict, read_tensors

# Safetensors first: the same weights, without a pickle.
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def load_image_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> CLIPImage:
    """Strictly; of a whole CLIP only the image half. ValueError where files are missing or do not fit."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = Path(folder)
    config = CLIPVisionConfig(
        **{k: v for k, v in vision_config(folder).items() if k not in ("model_type", "_name_or_path")}
    )
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds none of {', '.join(FILES)}.")
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    wanted = model.state_dict()
    # Old files store the numbers of the positions.
    found = {n: t for n, t in read_tensors(file).items() if n in wanted or n.startswith(("vision_model.", "visual_"))}
    found = {n: t for n, t in found.items() if not n.endswith("position_ids")}
    load_strict(model, found, source=file, assign=True)
    with torch.no_grad():  # positions are a buffer that no file holds
        embeddings = model.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return CLIPImage(model.to(dtype).eval().requires_grad_(False))
