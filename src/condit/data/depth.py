"""Depth maps by a depth network of transformers, whose weights are not part of condit."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from condit.data.images import ImageSource, load_image

MODEL = "LiheYoung/depth-anything-small-hf"  # what OminiControl's depth adapters were trained on


def depth(image: ImageSource, model: str | Path | None = None) -> Image.Image:
    """Relative depth, near is white, at the picture's size, its range stretched to 0 ... 255; three equal channels.

    model: a folder of a depth network as transformers saves it, or the name of one that was downloaded before. None:
    $CONDIT_HOME/models/depth-anything-small-hf, else Depth-Anything small in the cache of huggingface_hub. Nothing is
    fetched: ValueError where there are no weights.
    """
    import torch

    picture = load_image(image)
    processor, network = load(find(model))
    with torch.no_grad():
        found = network(**processor(images=picture, return_tensors="pt"))
    scaled: Any = processor.post_process_depth_estimation(found, [(picture.height, picture.width)])[0]
    values = scaled["predicted_depth"].numpy()
    spread = values - values.min()
    return Image.fromarray((spread / max(float(spread.max()), 1e-12) * 255).astype(np.uint8)).convert("RGB")


def find(model: str | Path | None) -> Path:
    """A folder with a depth network; ValueError without one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = MODEL.split("/")[-1]
    home = os.environ.get("CONDIT_HOME")
    ours = (Path(home).expanduser() if home else Path.home() / ".cache" / "condit") / "models" / name
    place = Path(model) if model is not None else ours
    if (place / "config.json").is_file():
        return place
    try:
        # Not transformers' own search: it asks the network even where it is told not to.
        return Path(snapshot_download(str(model or MODEL), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"no depth network at {str(model or MODEL)!r}: download {MODEL} into {ours} (`hf download {MODEL} "
            "--local-dir ...`), or give a ready depth map (annotate=False)."
        ) from error


@lru_cache(maxsize=1)
def load(place: Path):
    """The network and what prepares pictures for it, kept for the next picture."""
    # Not the automatic class: without torchvision it warns before it takes this one.
    from transformers import DPTImageProcessorPil
    from transformers.models.auto.modeling_auto import AutoModelForDepthEstimation

    network = AutoModelForDepthEstimation.from_pretrained(place, local_files_only=True)
    return DPTImageProcessorPil.from_pretrained(place, local_files_only=True), network.eval()
