"""After each step of a call: the caller's callback, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from condit.data.progress import Advance, progress_bar
from condit.diffusion.steps import OnStep, Path, Predict, Step
from condit.drawing.model import Side

# callback(pipe, i, timestep, tensors) -> the tensors that it replaces, or None.
Callback = Callable[[Any, int, float, dict], dict | None]
Tick = Callable[[], object]  # called before each prediction; what it raises ends the job
INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def steps_bar(steps: int, images: int, *, shown: bool) -> AbstractContextManager[Advance]:
    """The progress of a call, if it is shown."""
    if shown:
        return progress_bar(steps, "generating", images=images)
    return nullcontext(lambda n=1, note="": None)


@contextmanager
def levels_bar(predict: Predict, text: str, steps: int, tick: Tick | None, *, shown: bool) -> Iterator[Predict]:
    """The same prediction with `tick` called before it. Shown, each new noise level moves a bar of so many steps: some
    solvers predict more than once at a level."""
    last, left = math.nan, steps

    def moving(x: Tensor, step: Step) -> Tensor:
        nonlocal last, left
        if tick is not None:
            tick()
        if step.t != last and left:
            last, left = step.t, left - 1
            advance()
        return predict(x, step)

    with progress_bar(steps, text) if shown else nullcontext(lambda n=1, note="": None) as advance:
        yield moving


def check_inputs(names: Sequence[str]) -> None:
    """Raises ValueError for a tensor that no callback can be given."""
    unknown = [name for name in names if name not in INPUTS]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; a callback is given any of {', '.join(INPUTS)}."
        )


def after_step(
    pipe: object,
    path: Path,
    sides: Sequence[Side],
    callback: Callback | None,
    names: Sequence[str],
    advance: Advance,
) -> OnStep:
    """on_step(i, x, x0) -> x. A callback may replace latents; the text is for reading."""

    def tensor(name: str, x: Tensor) -> Tensor | None:
        if name == "latents":
            return x
        return sides[0].condition.tokens if name == "prompt_embeds" else sides[-1].condition.tokens

    def on_step(i: int, x: Tensor, x0: Tensor) -> Tensor:
        advance()
        if callback is None:
            return x
        replaced = callback(pipe, i, path.step(i).time, {name: tensor(name, x) for name in names}) or {}
        if "negative_prompt_embeds" in replaced or "prompt_embeds" in replaced:
            raise ValueError("A callback can replace latents only: the text was projected before the first step.")
        return replaced.get("latents", x)

    return on_step
