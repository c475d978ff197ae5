"""The tasks of OminiControl adapters as a table: how they were trained and where their conditions are placed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from condit.nn.lora import Shape, linear_shapes
from condit.nn.streams import Order, grid_ids

Side = Literal["left", "right"]


@dataclass(frozen=True)
class OminiConfig:
    """How an adapter was trained.

    delta: in image tokens (rows, columns), (0, 0) for aligned tasks; "left" and "right" are one width of the condition.
    scale: of compact conditions, and its `order` with delta. independent: conditions attend to themselves only, so that
    a cache is exact. annotator: computes the condition from an image.
    """

    task: str = "custom"
    delta: tuple[float, float] | Side = (0, 0)
    scale: float = 1.0
    independent: bool = False
    annotator: str | None = None
    order: Order = "scale-first"
    rank: int = 4
    alpha: float | None = None

    def __post_init__(self):
        if isinstance(self.delta, str) and self.delta not in ("left", "right"):
            raise ValueError(f"delta must be two numbers, 'left' or 'right'; found {self.delta!r}.")
        if not isinstance(self.delta, str) and (len(self.delta) != 2 or not all(map(math.isfinite, self.delta))):
            raise ValueError(f"delta must be two numbers, 'left' or 'right'; found {self.delta!r}.")
        if self.rank < 1:
            raise ValueError(f"rank is the width of the LoRA and must be at least 1; found {self.rank}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale spreads the positions of a condition and must be above 0; found {self.scale}.")


# Settings of the published files, which carry none. All were trained jointly. Comments describe the condition.
TASKS: dict[str, OminiConfig] = {
    "canny": OminiConfig("canny", annotator="canny"),  # experimental/canny (FLUX.1-dev); cv2.Canny(100, 200) of RGB
    "depth": OminiConfig("depth", annotator="depth"),  # experimental/depth; a map by Depth-Anything small as RGB
    "coloring": OminiConfig("coloring", annotator="gray"),  # experimental/coloring; luma
    # experimental/deblurring; trained on radius 1 to 10. The second generation's demos take 5, the first's 10.
    "deblurring": OminiConfig("deblurring", annotator="blur-5"),
    # experimental/fill; the image with the hidden part black (omini_images.hide), or token integration (`fill=`).
    "fill": OminiConfig("fill"),
    "depth_pred": OminiConfig("depth_pred"),  # a photo; generates its depth map. First generation: prompt "[depth] ..."
    "subject": OminiConfig("subject", "left"),  # omini/subject_1024_beta, and everything trained by the released code
    "subject-512": OminiConfig("subject-512", "right"),  # omini/subject_512, experimental/subject (schnell): (0, 32)
    "sr": OminiConfig("sr", "left"),  # the small image
    "art": OminiConfig("art", "left"),  # OminiControlArt; a photo, long side 512. image_guidance_scale=1.5, no prompt
    "cartoon": OminiConfig("cartoon", (0, -16)),  # saquiboye/oye-cartoon; a photo of a character
}


# Names of published files, without their ending -> task. "subject" is not among them: experimental/subject needs
# "subject-512", and what the released code trains under this name "subject".
FILES = {name: name for name in TASKS if name != "subject"}
FILES |= {"subject_512": "subject-512", "subject_1024_beta": "subject", "oye-cartoon": "cartoon"}
FILES |= dict.fromkeys(("ghibli", "irasutoya", "simpsons", "snoopy"), "art")


# Targets of the official configurations, without feed-forward inputs, text weights and heads.
TARGETS = (
    "x_embedder",
    "norm1.linear",
    "norm.linear",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "ff.net.2",
    "proj_mlp",
    *(f"single_transformer_blocks.{i}.proj_out" for i in range(64)),
)


def omini_targets(backbone: nn.Module) -> dict[str, Shape]:
    """The linears that the official LoRA adapts, path -> (out, in)."""
    return linear_shapes(backbone, TARGETS)


def check_streams(backbone: nn.Module) -> None:
    """Raises ValueError for a backbone that takes no streams."""
    if not hasattr(backbone, "prefill"):
        raise ValueError(
            f"OminiControl needs a backbone with streams; {type(backbone).__name__} has none. Use an MM-DiT ('tiny', "
            "'flux-dev') or condit.IPAdapter. A style LoRA is loaded by condit.StyleLoRA."
        )


def task_config(task: str | OminiConfig) -> OminiConfig:
    """A row of TASKS by name."""
    if isinstance(task, OminiConfig):
        return task
    if task not in TASKS:
        raise ValueError(f"No task {task!r}; there are {', '.join(TASKS)}. Or give an OminiConfig.")
    return TASKS[task]


def file_config(source: str | Path, settings: Mapping[str, object]) -> OminiConfig:
    """The configuration of a file: the settings in its metadata, else the task of a published file by its name. Raises
    ValueError for a file without either, because a wrong task places the condition wrongly without an error."""
    known = {field.name: settings[field.name] for field in fields(OminiConfig) if field.name in settings}
    if "delta" in known:
        delta = known["delta"]
        try:
            return OminiConfig(**{**known, "delta": tuple(delta) if isinstance(delta, list) else delta})  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: the settings in its metadata are broken ({error}). Give the task.") from error
    if (name := Path(source).stem) in FILES:
        return TASKS[FILES[name]]
    raise ValueError(
        f"{source} does not say for which task it was trained, and its name is not that of a published file. Give "
        f"it, OminiControl.load(file, pipe, task) or --control FILE=REF,task=TASK, one of: {', '.join(TASKS)}. A style "
        "LoRA is loaded by condit.StyleLoRA."
    )


def condition_ids(config: OminiConfig, grid: tuple[int, int]) -> Tensor:
    """Positions (N, 3) of a condition of `grid` = (rows, columns) tokens."""
    if isinstance(config.delta, str):
        # One width of the condition, counted in the tokens in which `order` counts delta.
        width = grid[1] * (config.scale if config.order == "scale-first" else 1)
        config = replace(config, delta=(0, -width if config.delta == "left" else width))
    assert not isinstance(config.delta, str)
    return grid_ids(*grid, delta=config.delta, scale=config.scale, order=config.order)
