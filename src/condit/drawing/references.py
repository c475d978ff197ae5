"""References of a call: read at a size, annotated, and identified by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Control, Fill, one_of
from condit.controls.ip_input import References
from condit.data import annotators
from condit.data.depth import depth
from condit.data.images import ImageSource, load_image, to_tensor

MAX_SIDE = 4096

ANNOTATORS: dict[str, Callable] = {
    name: getattr(annotators, name) for name in ("edges", "lines", "gray", "blur", "canny", "soft_edges")
}
ANNOTATORS |= {"depth": depth}
ANNOTATORS |= {f"blur-{radius}": partial(annotators.blur, sigma=float(radius)) for radius in (5, 10)}


def find_fill(controls: Sequence[Control], grid: tuple[int, int]) -> Fill | None:
    """The known part of the image, if a control has one. Raises ValueError for more than one, or for another size."""
    fills = [fill for fill in (control.fill() for control in controls) if fill is not None]
    if len(fills) > 1:
        raise ValueError(f"{len(fills)} controls fill a part of the image; at most one can.")
    if fills and tuple(fills[0].generated.shape) != grid:
        rows, columns = fills[0].generated.shape
        raise ValueError(
            f"The image to fill has {rows} x {columns} cells, this call generates {grid[0]} x {grid[1]}. Use the "
            "same size for the control and the call."
        )
    return fills[0] if fills else None


def read_references(
    reference: ImageSource | Sequence[ImageSource], annotator: str | None, size: tuple[int, int], pixels: int
) -> Tensor:
    """References as (n, 3, H, W) in [-1, 1] at `size` (height, width), annotated by `annotator`. Raises ValueError
    for sides that are not multiples of `pixels`, a token's side."""
    if any(side % pixels or not 0 < side <= MAX_SIDE for side in size):
        raise ValueError(f"size must be positive multiples of {pixels} up to {MAX_SIDE}; found {size[0]} x {size[1]}.")
    if annotator is not None:
        one_of("annotator", annotator, list(ANNOTATORS))
    sources = reference if isinstance(reference, list | tuple) else [reference]
    if not sources:
        raise ValueError("there is no reference: an empty list; give at least one image.")
    images = []
    for source in sources:
        image = load_image(cast("ImageSource", source), mode="RGBA" if annotator in ("edges", "lines") else "RGB")
        if annotator is not None:
            image = ANNOTATORS[annotator](image.resize((size[1], size[0]), Image.Resampling.LANCZOS))
        images.append(to_tensor(image, size))
    return torch.stack(images)


def describe_source(reference: References) -> list:
    """For each reference its path, if any, and a short hash of its content."""
    if isinstance(reference, list | tuple):
        return [entry for item in reference for entry in describe_source(item)]
    content = load_image(cast("ImageSource", reference)).tobytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest()[:16]}
    named = isinstance(reference, str | Path) and not str(reference).startswith("data:")
    return [{"path": str(reference), **entry} if named else entry]
