"""Images, prompts and controls of an edit, checked before the inversion, which may take minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor, nn

from condit.controls.control import Control, PromptPair, check_controls
from condit.controls.dit4edit import attention_recorder
from condit.controls.wrap import Targets
from condit.diffusion.inversion import EditPath
from condit.drawing.settings import check_text


@dataclass(frozen=True)
class Inversion:
    """An image's trajectory to noise under its prompt: a value for any number of edits.

    trajectory (S + 1, B, ...) are latents, the noisiest first, the last of them the image's own; again (B, ...) is
    what sampling from that noise gives: its difference is the round-trip error, rms (B,) in the latent and decibels
    (B,) with the latent's range as peak. size in pixels.
    """

    trajectory: Tensor
    path: EditPath
    source: tuple[str, ...]
    solver: str
    size: tuple[int, int]
    again: Tensor
    rms: Tensor
    decibels: Tensor
    model: str

    def __len__(self) -> int:
        return self.trajectory.shape[1]


def as_list(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def prompts_of(name: str, value: str | Sequence[str]) -> list[str]:
    """One prompt or a list of them as a list. Raises ValueError for anything else."""
    prompts = as_list(value)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{name} must be a prompt or a list of prompts; found {value!r}.")
    for prompt in prompts:
        check_text(prompt)
    return prompts


def source_prompts(source: str | Sequence[str], pictures: int) -> list[str]:
    """A source prompt for each image."""
    prompts = prompts_of("source", source)
    if len(prompts) not in (1, pictures) or not pictures:
        raise ValueError(f"{pictures} images and {len(prompts)} source prompts. Give one prompt, or one an image.")
    return prompts * (pictures // len(prompts))


@dataclass(frozen=True)
class EditPrompts:
    """images: a source prompt for each image; sources, targets: one of either for each edit."""

    pictures: list[str]
    sources: list[str]
    targets: list[str]

    @classmethod
    def of(cls, pictures: object, source: str | Sequence[str] | None, target: str | Sequence[str]) -> EditPrompts:
        """Of n images (or prompts in their place) and n targets, or one of either. Raises ValueError for other
        numbers."""
        if source is None:
            raise ValueError("An edit needs the source prompt, a description of the image such as 'a cat'.")
        sources, targets = source_prompts(source, len(as_list(pictures))), prompts_of("target", target)
        n = max(len(sources), len(targets))
        if len(sources) not in (1, n) or len(targets) not in (1, n):
            raise ValueError(
                f"{len(sources)} images and {len(targets)} target prompts. Give one of either, or as many of both."
            )
        return cls(sources, sources * (n // len(sources)), targets * (n // len(targets)))


def check_steps(steps: int | None, iterations: int) -> None:
    """Raises ValueError for invalid numbers of an inversion."""
    for name, value, least in (("num_inference_steps", steps, 1), ("iterations", iterations, 0)):
        if value is not None and (not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} must be a whole number, at least {least}; found {value!r}.")


def check_inversion(
    inversion: Inversion,
    source: str | Sequence[str] | None,
    name: str,
    size: tuple[int | None, int | None],
    steps: int | None,
    solver: str | None,
) -> None:
    """Raises ValueError unless the inversion is one of these prompts, by the model of this name, at this size, in these
    steps and by this solver; None: as it is."""
    if source is not None and tuple(as_list(source)) not in (inversion.source, inversion.source[:1]):
        raise ValueError(
            f"This inversion was made for {inversion.source[0]!r}, not {as_list(source)[0]!r}: words and noise "
            "belong together. Invert the image with the other prompt, or leave source out (None)."
        )
    if inversion.model != name:
        raise ValueError(f"This inversion was made with {inversion.model}; this is {name}. Invert it again.")
    if size != (None, None) and size != inversion.size:
        raise ValueError(f"This inversion has {inversion.size[0]} x {inversion.size[1]} pixels; leave the size out.")
    for what, requested, made in (
        ("num_inference_steps", steps, inversion.path.steps),
        ("solver", solver, inversion.solver),
    ):
        if requested not in (None, made):
            raise ValueError(
                f"This inversion was made with {what}={made!r}, and an edit must use the same; found {requested!r}. "
                f"Leave {what} out, or invert again."
            )


def edit_controls(controls: Sequence[Control], pair: PromptPair, backbone: nn.Module, maps: bool) -> list[Control]:
    """The controls of an edit: those with the act "edit" for its words, all others on the targets only. maps: one of
    them records the attention to the words. Raises ValueError for two of a kind with the act "edit"."""
    controls = list(check_controls(controls))
    if maps:
        recording = [control.recording() for control in controls]
        if not any(recording):
            recording, controls = [None, *recording], [attention_recorder(), *controls]
        controls = [control if other is None else other for control, other in zip(controls, recording, strict=True)]
    kinds = Counter(type(control).__name__ for control in controls if "edit" in control.acts)
    for name, count in kinds.items():
        if count > 1:
            raise ValueError(f"{count} {name} controls in one edit; it takes one. Put their settings together.")
    return [c.edit(pair, backbone) if "edit" in c.acts else Targets(c) for c in controls]


def same(source: str, target: str, controls: Sequence[Control]) -> bool:
    """Whether the target must equal the source."""
    return source == target and not any(control.differs() for control in controls)
