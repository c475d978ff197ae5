"""The model of a pipeline: one implementation for each family (flow.py, vp.py, classes.py, pixels.py).

C is the condition of a family: encoded text, or class numbers. Latents (B, ...) are float32 with unit variance at full
noise; each family has its own shape of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from condit.controls.control import Act, Control, PromptPair, Run, match_batch
from condit.diffusion.inversion import EditPath
from condit.diffusion.inversion import Solver as InversionSolver
from condit.diffusion.steps import Path, Step
from condit.drawing.settings import Settings
from condit.encoders.text import Text

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class Network(Protocol):
    """A network with its text or classes: the raw prediction for x (B, ...) at a step, in float32."""

    def __call__(self, x: Tensor, step: Step, controls: Sequence[Control]) -> Tensor: ...


class Side(NamedTuple):
    """One side of the guidance: what it is conditioned on, and the controls that act in it."""

    condition: Any
    controls: tuple[Control, ...]


# The one signature of all samplers (diffusion/steps.py); each reads its own family of paths.
Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class Layout:
    """The images of a run: their number, their size in pixels, and the grid of tokens. cells: the numbers of those
    tokens that are generated; None: all. memory: what the controls of a call share across the sides of guidance."""

    batch: int
    size: tuple[int, int]
    grid: tuple[int, int]
    cells: Tensor | None = None
    edit: PromptPair | None = None
    memory: dict = field(default_factory=dict)


class Conditions(Protocol[C_co]):
    """condition(positive): a row for each image of the batch, encoded at the first call."""

    def __call__(self, positive: bool, /) -> C_co: ...


class Model(Protocol, Generic[C]):
    """A family of models over its `parts`: weights, encoders and defaults."""

    @property
    def parts(self) -> Any: ...

    backbone: Any  # the network, which a caller may replace by a compiled one

    @property
    def reads(self) -> Literal["prompt", "class", "nothing"]: ...
    # Fields of `Settings` that the family supports, besides the common ones.
    @property
    def supports(self) -> frozenset[str]: ...
    # Values of output_type.
    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def fewest_steps(self) -> int: ...
    # Whether it is an inpainting model, which reads the mask and the image around it with the latents.
    @property
    def repaints(self) -> bool: ...
    # Move every part, in place.
    def to(self, device: str | torch.device) -> None: ...

    # Values of a call

    # With the model's defaults. Raises ValueError for unsupported values.
    def settings(self, requested: Settings, prompt: object) -> Settings: ...
    # Prompt and settings of a recipe, under the names of the call's arguments.
    def describe(self, prompt: object, negative: object, settings: Settings) -> dict[str, object]: ...
    # The number of prompts or classes. Raises ValueError for what the model cannot read.
    def count(self, prompt: object) -> int: ...

    def conditions(self, prompt: object, negative: object, settings: Settings) -> Conditions[C]: ...
    # The reason why a control cannot act on this model; None if it can.
    def refuse(self, control: Control) -> str | None: ...

    # Sizes

    # Height and width in pixels of an image where a call gives none.
    @property
    def size(self) -> tuple[int, int]: ...
    # Pixels of a token's side.
    @property
    def token(self) -> int: ...
    # Of an image's latent before any packing: (channels, rows, columns).
    def cells_shape(self, size: tuple[int, int]) -> tuple[int, int, int]: ...

    # Latents

    # Images (B, 3, H, W) in [-1, 1] -> latents: the mode of each posterior, or a sample by its own generator.
    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor: ...
    # Latents -> images (B, 3, H, W) in [-1, 1], float32.
    def decode(self, latents: Tensor, layout: Layout) -> Tensor: ...
    # Raises ValueError for an output that needs a missing part.
    def check_output(self, output_type: str) -> None: ...
    # A caller's first noise, arranged. Raises ValueError for another shape.
    def check_latents(self, latents: Tensor, layout: Layout) -> Tensor: ...
    # Clean latents at a level of the path.
    def noised(self, x0: Tensor, noise: Tensor, path: Any, level: int) -> Tensor: ...
    # Unit noise at the path's first level.
    def first(self, noise: Tensor, path: Any) -> Tensor: ...
    # (B, *cells_shape) -> the latents that the network reads.
    def arrange(self, cells: Tensor, layout: Layout) -> Tensor: ...

    # A run

    def path(self, settings: Settings, layout: Layout) -> tuple[Sampler, Path]: ...
    # Whether the sampler draws noise after the first.
    def draws_noise(self, settings: Settings) -> bool: ...
    # The default solver of an edit's inversion and its iterations; None: no edits.
    @property
    def inversion(self) -> tuple[InversionSolver, int] | None: ...
    # The only step of a run, at a noise level t in [0, 1].
    def step_at(self, t: float) -> Step: ...
    # (positive, with controls) of each prediction that the guidance needs, the positive one first.
    def sides(self, settings: Settings, controlled: bool) -> list[tuple[bool, bool]]: ...
    # The `Run` of a side, for its controls.
    def run(self, condition: C, layout: Layout, settings: Settings, controls: Sequence[Control]) -> Run: ...
    # The network for one side, or for all of them in one batch. Whatever does not depend on the step is computed here.
    # extra: channels that an inpainting model reads with the latents.
    def network(
        self, conditions: Sequence[C], layout: Layout, settings: Settings, extra: Tensor | None = None
    ) -> Network: ...
    # Whether all sides may run in one batch with controls of these acts.
    def joins(self, settings: Settings, acts: frozenset[Act]) -> bool: ...
    # The guided prediction from those of all sides.
    def guide(self, outputs: Sequence[Tensor], step: Step, settings: Settings) -> Tensor: ...


class TextModel(Model[Text], Protocol):
    """A family that reads prompts: it also encodes images, starts from them and, with an `inversion`, edits them."""

    # Whether the model supports one size only.
    @property
    def fixed_size(self) -> bool: ...
    # `encode` in one pass, with one generator for all.
    def encode_together(self, images: Tensor, generator: torch.Generator | None) -> Tensor: ...

    def encode_text(self, prompt: object, clip_skip: int | None = None) -> Text: ...
    # Clean latents at the level of a step.
    def noised_at(self, x0: Tensor, noise: Tensor, step: Step) -> Tensor: ...
    # (B, N) on the token grid -> a factor on latents.
    def spread(self, mask: Tensor, layout: Layout) -> Tensor: ...
    # The levels of an edit. Of models with an `inversion`.
    def edit_path(self, steps: int, layout: Layout, solver: InversionSolver) -> EditPath: ...
    # The velocity or noise that the path uses.
    def edit_output(self, output: Tensor, x: Tensor, path: Any, time: float) -> Tensor: ...


def rows_for(text: Text, count: int, copies: int) -> Text:
    """A row for each image: one text for all or one a prompt, repeated for the copies of each."""
    if len(text.tokens) not in (1, count):
        raise ValueError(f"{len(text.tokens)} negative prompts for {count} prompts. Give one, or as many as prompts.")
    return text.each(lambda part: match_batch(part, count, "prompt").repeat_interleave(copies, 0))


def common_sides(settings: Settings, controlled: bool) -> list[tuple[bool, bool]]:
    """The positive side; the text alone, where the controls have a scale of their own; the negative side."""
    sides = [(True, True)]
    if settings.image_guidance_scale is not None and controlled:
        sides.append((True, False))
    if settings.scale != 1.0 or len(sides) > 1:
        sides.append((False, False))
    return sides


def check_shape(latents: Tensor, shape: tuple[int, ...], what: str = "noise") -> Tensor:
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must be {what} of shape {shape}; found {tuple(latents.shape)}.")
    return latents


def latent_cell(vae) -> int:
    """Pixels of a latent cell's side."""
    config = vae.config
    return config.patch if hasattr(config, "patch") else 2 ** (len(config.block_out_channels) - 1)


def module_device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def module_dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
