"""Editing: invert an image once, then generate targets together with it (DiT4Edit, arXiv:2411.03286;
controls/dit4edit.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from condit.controls.control import Control, PromptPair, region_mask
from condit.data.images import ImageSource, load_image, mask_images, mask_list, to_images
from condit.diffusion.inversion import EditPath, Network, Solver, edit_along, round_trip_error, walk
from condit.diffusion.inversion import invert as to_noise
from condit.diffusion.steps import Predict, Step, image_noise
from condit.drawing.callbacks import Tick, levels_bar
from condit.drawing.edit_request import (
    EditPrompts,
    Inversion,
    as_list,
    check_inversion,
    check_steps,
    edit_controls,
    same,
    source_prompts,
)
from condit.drawing.model import Conditions, Layout, Side, TextModel
from condit.drawing.repaint import Reader
from condit.drawing.settings import Settings, check_size, image_generators, negative_prompts


class Editable(Reader, Protocol):
    """The pipeline of an edit; `edit` and `invert` below are its methods."""

    @property
    def text_model(self) -> TextModel: ...
    @property
    def name(self) -> str: ...
    @property
    def backbone(self) -> nn.Module: ...

    def sized(self, controls: Sequence[Control], size: tuple[int, int]) -> tuple[Control, ...]: ...
    def sides(
        self, conditions: Conditions, controls: Sequence[Control], layout: Layout, settings: Settings
    ) -> list[Side]: ...
    def predictor(self, sides: Sequence[Side], layout: Layout, settings: Settings) -> Predict: ...


@dataclass(frozen=True)
class EditResult:
    """images: the targets; sources: the images as their latents decode; round_trips: from the noise and back.

    psnr: of round_trips against sources in pixels, dB, one an image, and latent_psnr in the latent. records: what
    controls recorded, by name; words: the prompts over the model's tokens. A method without an inversion leaves
    `inversion` and `round_trips` None and the figures empty.
    """

    images: Any
    sources: Any
    round_trips: Any
    psnr: list[float]
    latent_psnr: list[float]
    inversion: Inversion | None
    recipe: dict
    records: dict[str, Tensor]
    words: PromptPair
    grid: tuple[int, int]

    @property
    def maps(self) -> Tensor | None:
        """(B, 2, N, L): mean attention of the image's tokens to the words of source and target, if recorded."""
        maps = self.records.get("maps")
        return None if maps is None else maps.unflatten(0, (-1, 2))


@dataclass(frozen=True)
class EditRun:
    """What a method of editing works with.

    source: latents (B, ...) of the images. predict(x, level): the guided velocity or noise that the path uses, for
    sources and targets in turn, (2 B, ...): source 0, target 0, source 1, ... mask(level): where the target may differ
    after a step, a factor on latents, or None. noise(): standard normal numbers of the source's shape. inversion: None
    where the method needs none.
    """

    source: Tensor
    path: EditPath
    predict: Callable[[Tensor, int], Tensor]
    mask: Callable[[int], Tensor | None]
    noise: Callable[[], Tensor]
    inversion: Inversion | None


class EditMethod(Protocol):
    """A method of editing: a run -> the targets' latents (B, ...). inverts: whether it needs the inversion."""

    @property
    def inverts(self) -> bool: ...

    def __call__(self, run: EditRun) -> Tensor: ...

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class Inverted:
    """Sample the target together with its source, which follows the stored trajectory of its inversion (DiT4Edit here).

    anchored: the target is corrected as the source is, so that the source's prompt gives the source back bit for bit;
    False: it starts from the same noise and follows its own predictions.
    """

    anchored: bool = True
    inverts = True

    def __call__(self, run: EditRun) -> Tensor:
        assert run.inversion is not None
        n = len(run.source)
        trajectory = run.inversion.trajectory.expand(-1, n, *run.inversion.trajectory.shape[2:])
        return edit_along(run.predict, trajectory, run.path, anchored=self.anchored, mask=run.mask)

    def describe(self) -> dict:
        return {"anchored": self.anchored}


@torch.no_grad()
def invert(
    pipe: Editable,
    image: ImageSource | Sequence[ImageSource],
    source: str | Sequence[str],
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    solver: Solver | None = None,
    iterations: int | None = None,
    progress: bool = False,
    tick: Tick | None = None,
) -> Inversion:
    """An image's trajectory to noise under its prompt, for any number of edits, with its round-trip error. One prompt
    for each image, or one for all. solver, iterations: as for `edit`; None on a UNet: "entered", DDIM's inversion."""
    images, model = as_list(image), pipe.text_model
    prompts = source_prompts(source, len(images))
    chosen, times = model.inversion or ("entered", 1)
    solver, iterations = solver or chosen, times if iterations is None else iterations
    check_steps(num_inference_steps, iterations)
    Settings(height=height, width=width)
    size = size_of(pipe, images, height, width)
    layout = Layout(len(images), size, grid_of(model, size))
    settings = edit_settings(pipe, layout.size, num_inference_steps, 1.0)
    path = model.edit_path(settings.steps, layout, solver)
    # No guidance: scale 1 as the network's input, or the text's prediction alone.
    sides = pipe.sides(model.conditions(prompts, None, settings), (), layout, settings)
    predict = pipe.predictor(sides, layout, settings)
    x0 = model.encode(pipe.read_images(images, None, layout.size))
    with levels_bar(predict, "inverting", 2 * settings.steps, tick, shown=progress) as moving:
        network = at_time(model, moving, path)
        trajectory = to_noise(network, x0, path, solver, iterations=iterations)
        if not torch.isfinite(trajectory).all():
            raise ValueError("The inversion produced NaN. Use more steps, or dtype=torch.float32.")
        again = walk(network, trajectory[0], path)
    rms, decibels = round_trip_error(trajectory, again)
    return Inversion(trajectory, path, tuple(prompts), solver, layout.size, again[-1], rms, decibels, pipe.name)


@torch.no_grad()
def edit(
    pipe: Editable,
    image: ImageSource | Sequence[ImageSource] | Inversion,
    source: str | Sequence[str] | None,
    target: str | Sequence[str],
    *,
    controls: Sequence[Control] = (),
    negative_prompt: str | Sequence[str] | None = None,
    mask: ImageSource | Sequence[ImageSource] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: Solver | None = None,
    iterations: int | None = None,
    anchored: bool = True,
    method: EditMethod | None = None,
    maps: bool = False,
    seed: int = 0,
    output_type: Literal["pil", "pt", "latent"] = "pil",
    progress: bool = False,
    tick: Tick | None = None,
) -> EditResult:
    """Change an image described by `source` into one described by `target`: controls=[DiT4Edit(...)]; other controls
    act on the target. n images and n targets make n edits; either may be one for all.

    image: images, or an `Inversion` of them (`invert`, or `result.inversion`), which saves inverting again. mask: white
    where the image may change, one for all or one for each edit. height, width: None: the image's shape in whole
    tokens, of the model's area at most; a model of one size ('tiny') resizes the image to it. solver, iterations: of
    inversion (condit.diffusion.inversion.invert); None: "fixed_point" with 2 where the model's paths are flows,
    "dpmpp2m" with 3 on PixArt, where "dpmpp2m" and "exact2m" also edit at second order. method: None:
    `Inverted(anchored)`. maps: record the attention to the words. seed: for methods with noise; edit i has seed + i.
    progress: show the steps. tick: called before each prediction; what it raises ends it. ValueError on a UNet."""
    if output_type not in ("pil", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'pt' or 'latent'; found {output_type!r}.")
    if method is not None and not callable(method):
        raise ValueError(f"method must be an edit method, a function of an EditRun; found {type(method).__name__}.")
    method, model = Inverted(anchored) if method is None else method, pipe.text_model
    chosen, times = editable(pipe)
    Settings(height=height, width=width)  # raises for what is no whole number
    check_steps(num_inference_steps, times if iterations is None else iterations)
    if isinstance(image, Inversion):
        check_inversion(image, source, pipe.name, (height, width), num_inference_steps, solver)
        inversion, prompts, size = image, EditPrompts.of(image.source, image.source, target), image.size
        num_inference_steps = inversion.path.steps
    else:
        inversion, prompts = None, EditPrompts.of(image, source, target)
        size = size_of(pipe, as_list(image), height, width)
    n, words = len(prompts.targets), model.parts.text.words
    if mask is not None and len(mask_list(mask)) not in (1, n):
        raise ValueError(f"{len(mask_list(mask))} masks for {n} edits. Give one, or one for each edit.")
    pair = PromptPair(tuple(words(prompts.sources)), tuple(words(prompts.targets)))
    acting = pipe.sized(edit_controls(controls, pair, pipe.backbone, maps), size)
    layout = Layout(2 * n, size, grid_of(model, size), edit=pair)
    settings = edit_settings(pipe, size, num_inference_steps, guidance_scale)
    both = [prompt for two in zip(prompts.sources, prompts.targets, strict=True) for prompt in two]
    negative = (
        None if negative_prompt is None else [text for text in negative_prompts(negative_prompt, n) for _ in (0, 1)]
    )
    conditions = model.conditions(both, negative, settings)
    # The run. Words and controls were checked before the inversion, which may take minutes.
    if inversion is None and method.inverts:
        how = {"num_inference_steps": num_inference_steps, "solver": solver, "iterations": iterations, "tick": tick}
        how["progress"] = progress
        inversion = invert(pipe, as_list(image), prompts.pictures, height=size[0], width=size[1], **how)
    if inversion is not None:
        path, latents = inversion.path, inversion.trajectory[-1]
    else:
        path = model.edit_path(settings.steps, layout, solver or chosen)
        latents = model.encode(pipe.read_images(as_list(image), None, size))
    sides = pipe.sides(conditions, acting, layout, settings)
    predict = pipe.predictor(sides, layout, settings)
    still = torch.tensor([same(s, t, acting) for s, t in zip(prompts.sources, prompts.targets, strict=True)])
    bound = None
    if mask is not None:
        white = (pipe.read_images(mask_images(mask), None, size)[:, 0] + 1) / 2
        bound = region_mask(white, layout.grid)[:, 0, :, 0]  # (1 or n, N)

    def where(level: int) -> Tensor | None:
        regions = [bound, *regions_at(sides[0].controls, path.step(level))]
        regions = [region.to(latents) for region in regions if region is not None]
        return model.spread(torch.stack(torch.broadcast_tensors(*regions)).prod(0), layout) if regions else None

    still = still.to(latents.device)
    originals, latents = latents, latents.expand(n, *latents.shape[1:])
    seeds, generators = image_generators(n, seed, None)
    noise = partial(image_noise(generators), latents)
    with levels_bar(predict, "editing", settings.steps, tick, shown=progress) as moving:
        output = partial(kept_equal, at_level(model, moving, path), still)
        edited = method(EditRun(latents, path, output, where, noise, inversion))
    records = {name: record for control in sides[0].controls for name, record in control.records().items()}
    recipe = {
        "model": pipe.name,
        "source": prompts.sources,
        "target": prompts.targets,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.scale,
        "solver": None if inversion is None else inversion.solver,
        **method.describe(),
        "size": list(size),
        "seeds": seeds,
        "controls": [control.describe() for control in acting],
        "hash": model.parts.hash,
    }
    shown = decoded(model, edited, originals, inversion, layout)
    return results(shown, inversion, output_type, recipe, records=records, words=pair, grid=layout.grid)


# The parts of an edit


def at_level(model: TextModel, predict: Predict, path: EditPath) -> Callable[[Tensor, int], Tensor]:
    """The velocity or noise that the path uses at a level."""
    return lambda x, level: model.edit_output(predict(x, path.step(level)), x, path, path.time(level))


def at_time(model: TextModel, predict: Predict, path: EditPath) -> Network:
    """The same at any time, without controls."""
    return lambda x, time: model.edit_output(predict(x, path.at(time)), x, path, time)


def kept_equal(predict: Callable[[Tensor, int], Tensor], still: Tensor, x: Tensor, level: int) -> Tensor:
    """Equal inputs give equal outputs where a target must equal its source (`still`, (B,) bool), although a kernel may
    round two rows of a batch differently."""
    before, after = (y.unflatten(0, (-1, 2)) for y in (x, predict(x, level)))
    equal = still & (before[:, 0] == before[:, 1]).flatten(1).all(1)
    target = torch.where(equal.reshape(-1, *[1] * (after.ndim - 2)), after[:, 0], after[:, 1])
    return torch.stack([after[:, 0], target], 1).flatten(0, 1)


def regions_at(controls: Sequence[Control], step: Step) -> list[Tensor]:
    """The regions in which the controls of a step let the target differ from its source."""
    acting = [control.at(step) for control in controls]
    return [m for m in (control.region() for control in acting if control is not None) if m is not None]


def edit_settings(pipe: Editable, size: tuple[int, int], steps: int | None, scale: float | None) -> Settings:
    """The model's own settings at a size."""
    height, width = size
    requested = Settings(height=height, width=width, num_inference_steps=steps, guidance_scale=scale)
    supported = pipe.text_model.supports
    requested = requested.filled(guidance_in_one_call=False) if "guidance_in_one_call" in supported else requested
    return pipe.text_model.settings(requested, "edit")


def grid_of(model: TextModel, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // model.token, size[1] // model.token


def size_of(pipe: Editable, images: Sequence[ImageSource], height: int | None, width: int | None) -> tuple[int, int]:
    """The size at which images are edited: that of the call, else the first image's shape."""
    model = pipe.text_model
    fixed = model.fixed_size or None not in (height, width)
    fitted = fitted_size(images, model.size, model.token, fixed=fixed)
    size = height or fitted[0], width or fitted[1]
    check_size(size, model.token)
    return size


def editable(pipe: Editable) -> tuple[Solver, int]:
    """The default solver of an inversion and its iterations. Raises ValueError for models without edits."""
    if pipe.text_model.inversion is None:
        raise ValueError(
            f"{pipe.name} supports no edits: editing needs a transformer with prompts, as PixArt, 'tiny' or FLUX.1."
        )
    return pipe.text_model.inversion


def fitted_size(images: Sequence[ImageSource], size: tuple[int, int], multiple: int, fixed: bool) -> tuple[int, int]:
    """Height and width at which images are edited: the model's area in the first image's shape, in whole tokens; a
    `fixed` model's own size. Raises ValueError for images of more than one shape."""
    if fixed:
        return size
    area, sizes = size[0] * size[1], set()
    for source in images:
        width, height = load_image(source).size
        scale = min((area / (width * height)) ** 0.5, 1.0)
        sizes.add(tuple(max(round(side * scale / multiple), 1) * multiple for side in (height, width)))
    if len(sizes) > 1:
        raise ValueError(f"Images of {len(sizes)} shapes in one batch. Give height and width, or edit them one by one.")
    height, width = sizes.pop()
    return height, width


def decoded(
    model: TextModel, edited: Tensor, source: Tensor, inversion: Inversion | None, layout: Layout
) -> list[tuple[Tensor, Tensor] | None]:
    """Latents and images of target, source and round trip."""
    if not torch.isfinite(edited).all():
        raise ValueError("The edit produced NaN. Lower the guidance, or use dtype=torch.float32.")
    latents = [edited, source, None if inversion is None else inversion.again]
    return [None if x is None else (x, model.decode(x, layout)) for x in latents]


def results(
    shown: Sequence[tuple[Tensor, Tensor] | None],
    inversion: Inversion | None,
    output_type: str,
    recipe: dict,
    *,
    records: dict[str, Tensor],
    words: PromptPair,
    grid: tuple[int, int],
) -> EditResult:
    """Outputs of a kind, and the error of the round trip."""
    psnr: list[float] = []
    source, again = shown[1], shown[2]
    if source is not None and again is not None:
        error = ((source[1] - again[1]) / 2).square().flatten(1).mean(1)
        psnr = (-10 * error.clamp(min=1e-12).log10()).tolist()
        recipe |= {"round_trip_psnr": [round(x, 2) for x in psnr]}

    def output(both: tuple[Tensor, Tensor] | None) -> Any:
        if both is None or output_type == "latent":
            return both and both[0]
        return both[1] if output_type == "pt" else to_images(both[1])

    latent_psnr = [] if inversion is None else inversion.decibels.tolist()
    target, source, again = map(output, shown)
    return EditResult(target, source, again, psnr, latent_psnr, inversion, recipe, records, words, grid)
