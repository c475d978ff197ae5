"""Depth maps by a depth network of transformers. Its weights are not part of condit."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from condit.data.images import ImageSource, load_image

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "LiheYoung/depth-anything-small-hf"  # the model with which OminiControl's depth adapters were trained


def depth(image: ImageSource, model: str | Path | None = None) -> Image.Image:
    """Relative depth at the image's size, near is white, its range scaled to 0 ... 255; three equal channels.

    model: the folder of a depth network as transformers saves it, or the name of a downloaded one. None:
    $CONDIT_HOME/models/depth-anything-small-hf, else Depth-Anything small in the cache of huggingface_hub. Nothing is
    downloaded. ValueError if there are no weights.
    """
    import torch

    picture = load_image(image)
    processor, network = load(resolve_folder(model))
    with torch.no_grad():
        output = network(**processor(images=picture, return_tensors="pt"))
    maps = processor.post_process_depth_estimation(output, [(picture.height, picture.width)])
    values = cast("dict[str, Tensor]", maps[0])["predicted_depth"].numpy()
    relative = values - values.min()
    return Image.fromarray((relative / max(float(relative.max()), 1e-12) * 255).astype(np.uint8)).convert("RGB")


def resolve_folder(model: str | Path | None) -> Path:
    """The folder of a depth network. ValueError if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = MODEL.split("/")[-1]
    home = os.environ.get("CONDIT_HOME")
    default = (Path(home).expanduser() if home else Path.home() / ".cache" / "condit") / "models" / name
    folder = Path(model) if model is not None else default
    if (folder / "config.json").is_file():
        return folder
    try:
        # transformers' own search accesses the network even with local_files_only.
        return Path(snapshot_download(str(model or MODEL), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"no depth network at {str(model or MODEL)!r}: download {MODEL} into {default} (`hf download {MODEL} "
            "--local-dir ...`), or pass an existing depth map (annotate=False)."
        ) from error


@lru_cache(maxsize=1)
def load(folder: Path):
    """The image processor and the network of a folder; the last ones stay in memory."""
    # Without torchvision the automatic class warns before it takes this one.
    from transformers import DPTImageProcessorPil
    from transformers.models.auto.modeling_auto import AutoModelForDepthEstimation

    network = AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True)
    return DPTImageProcessorPil.from_pretrained(folder, local_files_only=True), network.eval()
