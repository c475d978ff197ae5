"""Round trips of `condit evaluate edit`, from pictures to noise and back, and what merging tokens saves of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from condit.controls.dit4edit import DiT4Edit
from condit.controls.token_merging import TokenMerging
from condit.data.sheets import SheetCell, contact_sheet
from condit.diffusion.inversion import Solver
from condit.drawing.pipeline import Pipeline
from condit_lab.suites.edit_rows import EditRow, differences, interval

if TYPE_CHECKING:
    from condit.drawing.pipeline import Pipeline

BATCH = 16
# Network calls a level on the way up. A flow has no solver of second order here.
FLOW: dict[Solver, int] = {"first_order": 1, "entered": 1, "fixed_point": 3}
NOISE: dict[Solver, int] = {"first_order": 1, "dpmpp2m": 1, "entered": 1, "fixed_point": 3}
PHOTOS = {
    "astronaut.png": "an astronaut",
    "chelsea.png": "a cat face",
    "coffee.png": "a cup of coffee",
    "rocket.jpg": "a rocket",
}
WINDOW = 0.4  # of a photograph's shorter side
TRIP, NOISE_SPREAD = "round trip, dB in the latent", "deviation of the noise reached"
MERGED_TOKENS, MERGED_STEP = 1024, "time of an edit's step"


def solvers_of(pipe: Pipeline) -> dict[Solver, int]:
    return FLOW if pipe.model.inversion == ("fixed_point", 2) else NOISE


def photographs(count: int = 4) -> tuple[list[Image.Image], list[str]]:
    """Squares of four photographs that scikit-image ships, and their prompts: of each in turn the middle, whole, then
    windows in other places."""
    import skimage

    folder, squares, prompts = Path(str(skimage.__file__)).parent / "data", [], []
    opened = {name: Image.open(folder / name).convert("RGB") for name in PHOTOS}
    for i in range(count):
        name = list(PHOTOS)[i % len(PHOTOS)]
        squares.append(window(opened[name], i // len(PHOTOS)))
        prompts.append(PHOTOS[name])
    return squares, prompts


def window(image: Image.Image, number: int) -> Image.Image:
    """Window 0 is the middle at full height; the others lie along a golden spiral of places, so that none coincide."""
    side = min(image.size)
    across, down = 0.5, 0.5
    if number:
        side = int(side * WINDOW)
        across, down = number * 0.7548776662466927 % 1, number * 0.5698402909980532 % 1
    left, top = int(across * (image.width - side)), int(down * (image.height - side))
    return image.crop((left, top, left + side, top + side))


def round_trips(
    pipe: Pipeline,
    what: str,
    images: list[Image.Image],
    prompts: list[str],
    trip_steps: Sequence[int],
    tell: Callable[[str], None],
) -> list[EditRow]:
    """Latent PSNR from picture to noise and back, and the deviation of that noise (of unit noise 1), by solver and
    steps; a solver minus another with as many network calls or more."""
    rows, trips, calls = [], {}, {}
    solvers = solvers_of(pipe)
    for steps in trip_steps:
        for solver, a_level in solvers.items():
            case = f"{solver}, {steps} steps, {a_level * steps} network calls"
            how = {"num_inference_steps": steps, "solver": solver, "iterations": a_level - 1 or 1}
            inversions = [
                pipe.invert(images[at : at + BATCH], prompts[at : at + BATCH], **how)
                for at in range(0, len(images), BATCH)
            ]
            trips[case], calls[case] = torch.cat([x.decibels for x in inversions]), (solver, steps)
            spread = torch.cat([x.trajectory[0].flatten(1).std(1) for x in inversions])
            rows.append(interval(what, TRIP, case, trips[case], prompts))
            rows.append(interval(what, NOISE_SPREAD, case, spread, prompts))
        tell(f"round trips of {what}: {steps} steps")
    second = [case for case, (solver, _) in calls.items() if solver == "dpmpp2m"]
    first = [case for case, (solver, _) in calls.items() if solver == "first_order"]
    pairs = [(one, other) for one in second for other in first if calls[one][1] <= calls[other][1]]
    return rows + differences(what, TRIP, trips, prompts, pairs)


def show_trips(pipe: Pipeline, images: list[Image.Image], prompts: list[str], steps: int, most: int = 8) -> Image.Image:
    """Pictures as given, as their latents decode, and back from the noise by every solver that asks once a level."""
    images, prompts = images[:most], prompts[:most]
    shown: dict[str, list[Image.Image]] = {}
    for solver, calls in solvers_of(pipe).items():
        if calls > 1:
            continue
        inversion = pipe.invert(images, prompts, num_inference_steps=steps, solver=solver)
        shown.setdefault("latent", pipe.decode(inversion.trajectory[-1], inversion.size))
        shown[f"{solver}, {steps} steps"] = pipe.decode(inversion.again, inversion.size)
    rows = [
        [SheetCell(image, "given", is_input=True), *(SheetCell(pictures[i], case) for case, pictures in shown.items())]
        for i, image in enumerate(images)
    ]
    return contact_sheet(rows, prompts)


def clock(device: torch.device) -> float:
    """Seconds; on a CPU those that this process computed, as others may be busy beside it."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def merging_time(pipe: Pipeline, count: int, tell: Callable[[str], None]) -> list[EditRow]:
    """Seconds of single steps of an edit with so many tokens that merging is meant for, plain and merged in turn, with
    the control that is the preset's; the picture is one colour, as its content takes no time."""
    if pipe.model.inversion == ("fixed_point", 2):
        return []  # the embedded MM-DiT has the tokens of one size only
    side = int(MERGED_TOKENS**0.5) * pipe.pixels
    inversion = pipe.invert(Image.new("RGB", (side, side), "gray"), "a cat", height=side, width=side, **ONE_STEP)
    cases = {"unified": [DiT4Edit()], "unified, merging 50 %": [DiT4Edit(), TokenMerging(0.5)]}
    spent: dict[str, list[float]] = {case: [] for case in cases}
    for i in range(count + 1):
        for case, controls in cases.items():
            began = clock(pipe.device)
            pipe.edit(inversion, None, "a dog", controls=controls, output_type="latent")
            if i:  # the first is for warming up
                spent[case].append(clock(pipe.device) - began)
    values: dict[str, Tensor] = {case: torch.tensor(times) for case, times in spent.items()}
    each = [str(i) for i in range(count)]
    rows = [interval("speed", MERGED_STEP, case, times, each) for case, times in values.items()]
    tell(f"time of steps with {MERGED_TOKENS} tokens")
    return rows + differences("speed", MERGED_STEP, values, each, [("unified, merging 50 %", "unified")])


ONE_STEP: dict[str, Any] = {"num_inference_steps": 1}
