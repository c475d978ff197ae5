"""The optional arguments of a call as one value, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, cast

import torch

from condit.controls.control import finite
from condit.data.messages import text
from condit.drawing.references import MAX_SIDE

MAX_STEPS = 1000
WHOLE = ("height", "width", "num_inference_steps", "clip_skip", "copies")
REAL = ("guidance_scale", "guidance_rescale", "guidance_power", "image_guidance_scale", "eta", "strength")
MAX_SEED = 2**62 - 1
PUBLIC = {"copies": "num_images_per_prompt"}


@dataclass(frozen=True)
class Settings:
    """The optional arguments of a call. None means the model's default, which `Model.settings` fills in.

    Sizes are (height, width) in pixels. `copies` is num_images_per_prompt.
    """

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_power: float | None = None
    guidance_channels: int | Literal["all"] | None = None
    guidance_in_one_call: bool | None = None
    image_guidance_scale: float | None = None
    sampler: str | None = None
    eta: float | None = None
    strength: float | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    copies: int = 1

    def __post_init__(self):
        """Numbers become Python's, as recipes hold them. Raises ValueError for anything else, and for NaN."""
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(f"{PUBLIC.get(name, name)} must be a whole number; found {value!r}.")
            object.__setattr__(self, name, None if value is None else int(value))
        for name in REAL:
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else finite(name, value))

    def filled(self, **defaults: Any) -> Settings:
        """With defaults for what is None."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)

    @property
    def size(self) -> tuple[int, int]:
        assert self.height is not None and self.width is not None
        return self.height, self.width

    @property
    def steps(self) -> int:
        assert self.num_inference_steps is not None
        return self.num_inference_steps

    @property
    def scale(self) -> float:
        """Scale of the guidance by text or class; 1: no guidance."""
        return 1.0 if self.guidance_scale is None else float(self.guidance_scale)


# Every model reads these.
COMMON = frozenset({"height", "width", "num_inference_steps", "copies"})


def check_supported(name: str, settings: Settings, supported: frozenset[str]) -> None:
    """Raises ValueError for an argument that the model does not read."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None and field.name not in COMMON | supported:
            raise ValueError(f"{name} does not support {field.name}; found {value!r}. Leave it out.")


def check_size(size: tuple[int, int], side: int) -> None:
    """Raises ValueError unless height and width are multiples of `side`, the model's smallest unit in pixels."""
    if any(pixels % side or not 0 < pixels <= MAX_SIDE for pixels in size):
        raise ValueError(text("wrong-size", side=side, most=MAX_SIDE, height=size[0], width=size[1]))


def check_counts(
    steps: int, copies: int, output_type: str, *, fewest: int = 1, kinds: Sequence[str] = ("pil", "pt", "np", "latent")
) -> None:
    """Raises ValueError for a number of steps below `fewest` or above MAX_STEPS, of images, or an unknown kind of
    output."""
    if not isinstance(steps, Integral) or not fewest <= steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps must be {fewest} to {MAX_STEPS}; found {steps}.")
    if not isinstance(copies, Integral) or copies < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1; found {copies}.")
    if output_type not in kinds:
        named = f"{', '.join(map(repr, kinds[:-1]))} or {kinds[-1]!r}"
        raise ValueError(f"output_type must be {named}; found {output_type!r}.")


def prompt_list(prompt: object) -> list[str]:
    """One prompt or a list of them as a list. Raises ValueError for anything else, and for an empty list."""
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt must be a string or a list of strings; found {prompts!r}.")
    texts = [str(p) for p in prompts]
    for p in texts:
        check_text(p)
    return texts


def check_text(text: str) -> None:
    """Raises ValueError for a text that is not Unicode, as a terminal gives bytes of another encoding."""
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError(f"The prompt is not Unicode text; found {text!r}. Write it in UTF-8.")


def negative_prompts(negative: object, n: int) -> list[str]:
    """n negative prompts from one, n or none."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * n
    prompts = list(cast("Sequence[str]", negative))
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} negative prompts for {n} prompts. Give one, or as many as prompts.")
    return prompts


def image_generators(
    batch: int, seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> tuple[list[int | None], list[torch.Generator]]:
    """Seeds and generators, one for each image: image i has seed + i (seed None or, as in A1111, -1: a random one)."""
    if generator is not None and seed is not None:
        raise ValueError("Give seed or generator, not both.")
    if generator is not None:
        generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} images.")
        return [None] * batch, generators
    if seed is not None and (not isinstance(seed, Integral) or not -1 <= seed <= MAX_SEED):
        raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}, or -1 for a random one; found {seed!r}.")
    # torch.seed() would change the global seed.
    first = torch.Generator().seed() % 2**31 if seed is None or seed == -1 else int(seed)
    return [first + i for i in range(batch)], [torch.Generator().manual_seed(first + i) for i in range(batch)]
