"""Editing: invert a picture once, then draw targets beside it (DiT4Edit, arXiv:2411.03286; controls/dit4edit.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from condit.controls.control import Control, Pair, Step, region_mask
from condit.controls.dit4edit import DiT4Edit
from condit.data.images import ImageSource, load_image, to_images
from condit.diffusion.inversion import Network, Path, Solver, edit_along, round_trip_error, walk
from condit.diffusion.inversion import invert as to_noise
from condit.drawing.edit_request import (
    Asked,
    as_list,
    check_inversion,
    check_steps,
    edit_controls,
    same,
    source_prompts,
)


@dataclass(frozen=True)
class Inversion:
    """A picture's way to noise under its prompt: a value that serves any number of edits.

    trajectory (S + 1, B, ...) are latents, the noisiest first, the last of them the picture's own; again (B, ...) is
    where sampling from that noise ends, without a stored trajectory: its distance is the round-trip error, rms (B,) in
    the latent and decibels (B,) with the latent's range as peak. size in pixels.
    """

    trajectory: Tensor
    path: Path
    source: tuple[str, ...]
    solver: str
    size: tuple[int, int]
    again: Tensor
    rms: Tensor
    decibels: Tensor
    model: str

    def __len__(self) -> int:
        return self.trajectory.shape[1]


@dataclass(frozen=True)
class EditResult:
    """images: the targets; sources: the pictures as their latents decode; round_trips: from the noise and back.

    psnr: of round_trips against sources in pixels, dB, one a picture, and latent_psnr in the latent. maps: (B, 2, N, L)
    mean attention of the picture's tokens to the words of source and target, if it was asked for; words: those prompts.
    """

    images: Any
    sources: Any
    round_trips: Any
    psnr: list[float]
    latent_psnr: list[float]
    inversion: Inversion
    recipe: dict
    maps: Tensor | None = None
    words: Pair | None = None
    grid: tuple[int, int] = (0, 0)


class Editor(Protocol):
    """What a kind of pipeline brings to be edited with; latents (B, ...) in float32, sizes in pixels. solver and
    iterations are those of the inversion."""

    @property
    def pipe(self) -> Any: ...

    @property
    def solver(self) -> Solver: ...

    @property
    def iterations(self) -> int: ...

    def path(self, steps: int, size: tuple[int, int]) -> Path: ...

    def network(self, prompts: list[str], size: tuple[int, int], path: Any) -> Network:
        """Predictions without guidance and controls."""
        ...

    def predictor(
        self,
        pair: Pair,
        prompts: list[str],
        negative: list[str],
        controls: Sequence[Control],
        size: tuple[int, int],
        path: Any,
        scale: float,
    ) -> Predictor: ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor: ...

    def grid(self, size: tuple[int, int]) -> tuple[int, int]: ...

    def spread(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N) of the token grid -> what multiplies latents."""
        ...

    def size(self, images: Sequence[ImageSource], height: int | None, width: int | None) -> tuple[int, int]: ...


class Predictor(Protocol):
    """Guided predictions for sources and targets in turn, and what the controls say behind each step."""

    @property
    def memory(self) -> dict: ...

    def __call__(self, x: Tensor, level: int) -> Tensor: ...

    def regions(self, level: int) -> list[Tensor]: ...


class Editable(Protocol):
    """A pipeline whose pictures can be edited: `edit` and `invert` below are its methods."""

    def editor(self, solver: Solver | None, iterations: int | None) -> Editor:
        """None: what suits the kind of pipeline."""
        ...


def regions_at(controls: Sequence[Control], step: Step) -> list[Tensor]:
    """Where the controls of a step let the target differ from its source."""
    acting = [control.at(step) for control in controls]
    return [m for m in (control.region() for control in acting if control is not None) if m is not None]


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
) -> Inversion:
    """A picture's way to noise under its prompt, for several edits of it; its round-trip error is in it. One prompt a
    picture, or one for all. solver, iterations: as for `edit`."""
    return inverted(pipe.editor(solver, iterations), image, source, num_inference_steps, height, width)


def inverted(
    editor: Editor,
    image: ImageSource | Sequence[ImageSource],
    source: str | Sequence[str],
    steps: int | None,
    height: int | None,
    width: int | None,
) -> Inversion:
    """Encode and invert pictures under their prompts, without guidance."""
    images = as_list(image)
    prompts = source_prompts(source, len(images))
    check_steps(steps, editor.iterations)
    size = editor.size(images, height, width)
    path = editor.path(editor.pipe.parts.steps if steps is None else steps, size)
    network = editor.network(prompts, size, path)
    x0 = editor.encode(editor.pipe.read_images(images, None, size))
    trajectory = to_noise(network, x0, path, editor.solver, iterations=editor.iterations)
    if not torch.isfinite(trajectory).all():
        raise ValueError("The inversion produced NaN. Use more steps, or dtype=torch.float32.")
    again = walk(network, trajectory[0], path)
    rms, decibels = round_trip_error(trajectory, again)
    return Inversion(trajectory, path, tuple(prompts), editor.solver, size, again[-1], rms, decibels, editor.pipe.name)


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
    maps: bool = False,
    output_type: Literal["pil", "pt", "latent"] = "pil",
) -> EditResult:
    """Change what `source` says of a picture into what `target` says: controls=[DiT4Edit(...)], other controls act
    on the target. n pictures and n targets make n edits; one of either serves all of the other.

    image: pictures, or an `Inversion` of them (`invert`, or `result.inversion`), which saves inverting again. mask:
    white where the picture may change, one for all or one an edit. height, width: None: the picture's shape in whole
    tokens, of the model's area at most; a model of one size ('tiny') squashes the picture to it. solver, iterations:
    of the inversion (condit.diffusion.inversion.invert); None: "fixed_point" with 2 where the model's paths are flows,
    "dpmpp2m" with 3 on PixArt, where "dpmpp2m" and "exact2m" also edit at second order. anchored: the target is
    corrected as the source is, so that the source's prompt gives the source back bit for bit; False: it starts from
    the same noise and follows its predictions. maps: keep the attention to the words. ValueError on a UNet.
    """
    if output_type not in ("pil", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'pt' or 'latent'; found {output_type!r}.")
    editor = pipe.editor(solver, iterations)
    # What is wrong with words or controls is told before the minutes that an inversion may take.
    if isinstance(image, Inversion):
        check_inversion(image, source, editor.pipe.name, (height, width), num_inference_steps, solver)
        asked = Asked.of(image.source, image.source, target)
    else:
        asked = Asked.of(image, source, target)
    n, sources, targets = len(asked.targets), asked.sources, asked.targets
    given = edit_controls(controls, maps)
    words = editor.pipe.parts.text.words
    pair = Pair(tuple(words(sources)), tuple(words(targets)))
    for control in given:
        if isinstance(control, DiT4Edit):
            control.check(pair, editor.pipe.backbone)
    if mask is not None and len(as_list(mask)) not in (1, n):
        raise ValueError(f"{len(as_list(mask))} masks for {n} edits. Give one, or one an edit.")
    negatives = [text for text in editor.pipe.negatives(negative_prompt, n) for _ in (0, 1)]
    inversion = image
    if not isinstance(inversion, Inversion):
        inversion = inverted(editor, inversion, asked.pictures, num_inference_steps, height, width)
    trajectory = inversion.trajectory.expand(-1, n, *inversion.trajectory.shape[2:])
    scale = editor.pipe.parts.guidance if guidance_scale is None else guidance_scale
    prompts = [p for both in zip(sources, targets, strict=True) for p in both]
    size, path = inversion.size, inversion.path
    predict, grid = editor.predictor(pair, prompts, negatives, given, size, path, scale), editor.grid(size)
    bound = None
    if mask is not None:
        white = (editor.pipe.read_images(mask, None, size)[:, 0] + 1) / 2
        bound = region_mask(white, grid)[:, 0, :, 0]  # (1 or n, N)
    still = torch.tensor([same(s, t, given) for s, t in zip(sources, targets, strict=True)])

    def predicted(x: Tensor, level: int) -> Tensor:
        out = predict(x, level)
        # Equal inputs give equal outputs; a kernel may round two rows of a batch differently.
        old, new = (y.unflatten(0, (-1, 2)) for y in (x, out))
        equal = still.to(x.device) & (old[:, 0] == old[:, 1]).flatten(1).all(1)
        kept = torch.where(equal.reshape(-1, *[1] * (new.ndim - 2)), new[:, 0], new[:, 1])
        return torch.stack([new[:, 0], kept], 1).flatten(0, 1)

    def where(level: int) -> Tensor | None:
        found = [m.to(trajectory) for m in (bound, *predict.regions(level)) if m is not None]
        return editor.spread(torch.stack(torch.broadcast_tensors(*found)).prod(0), size) if found else None

    drawn = edit_along(predicted, trajectory, inversion.path, anchored=anchored, mask=where)
    return results(
        editor,
        inversion,
        drawn,
        pair,
        predict.memory,
        grid,
        output_type,
        {
            "model": editor.pipe.name,
            "source": sources,
            "target": targets,
            "num_inference_steps": inversion.path.steps,
            "guidance_scale": scale,
            "solver": inversion.solver,
            "anchored": anchored,
            "size": list(inversion.size),
            "controls": [control.describe() for control in given],
        },
    )


def results(
    editor: Editor,
    inversion: Inversion,
    drawn: Tensor,
    pair: Pair,
    memory: dict,
    grid: tuple[int, int],
    output_type: str,
    recipe: dict,
) -> EditResult:
    """Decode target, source and round trip, and compare the last two."""
    if not torch.isfinite(drawn).all():
        raise ValueError("The edit produced NaN. Lower the guidance, or use dtype=torch.float32.")
    shown = [drawn, inversion.trajectory[-1], inversion.again]
    flat = [editor.decode(x, inversion.size) for x in shown]
    error = ((flat[1] - flat[2]) / 2).square().flatten(1).mean(1)
    psnr = (-10 * error.clamp(min=1e-12).log10()).tolist()
    outputs = shown if output_type == "latent" else flat
    if output_type == "pil":
        outputs = [to_images(x) for x in flat]
    maps = memory.get("DiT4Edit", {}).get("maps")
    recipe |= {"hash": editor.pipe.parts.hash, "round_trip_psnr": [round(x, 2) for x in psnr]}
    return EditResult(
        *outputs,
        psnr=psnr,
        latent_psnr=inversion.decibels.tolist(),
        inversion=inversion,
        recipe=recipe,
        maps=None if maps is None else maps.unflatten(0, (-1, 2)),
        words=pair,
        grid=grid,
    )


def fitted_size(images: Sequence[ImageSource], size: tuple[int, int], multiple: int, fixed: bool) -> tuple[int, int]:
    """Height and width at which pictures are edited: the model's area in the first picture's shape, in whole tokens; a
    `fixed` model's own size. ValueError for pictures of several shapes."""
    if fixed:
        return size
    area, found = size[0] * size[1], set()
    for source in images:
        width, height = load_image(source).size
        scale = min((area / (width * height)) ** 0.5, 1.0)
        found.add(tuple(max(round(side * scale / multiple), 1) * multiple for side in (height, width)))
    if len(found) > 1:
        raise ValueError(
            f"Pictures of {len(found)} shapes in one batch. Give height and width, or edit them one by one."
        )
    height, width = found.pop()
    return height, width
