"""A control: an immutable value that acts on the one attention call (docs/architecture.md, section 1)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from condit.diffusion.steps import Step
from condit.encoders.words import Words
from condit.nn.attention import Attend, Call, Reduction, Site
from condit.nn.lora import LowRank
from condit.nn.streams import Stream

if TYPE_CHECKING:
    from condit.controls.host import Host
    from condit.data.images import ImageSource
    from condit.encoders.text import Text


@dataclass(frozen=True)
class When:
    """The part of the schedule in which a control acts: step i of n acts if start <= i/n and (i + 1)/n <= end.

    The rule of the official IP-Adapter pipeline. `curve` maps i/n to a factor on the strength.
    """

    start: float = 0.0
    end: float = 1.0
    curve: Callable[[float], float] | None = None

    def __post_init__(self):
        if not 0 <= finite("The start of when", self.start) < self.end <= 1:
            raise ValueError(f"When needs 0 <= start < end <= 1; found start {self.start}, end {self.end}.")

    @classmethod
    def of(cls, value: When | tuple[float, float] | None) -> When:
        """None = always; a pair is start and end."""
        if isinstance(value, When):
            return value
        if value is None:
            return cls()
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise ValueError(f"when must be condit.When, or a pair (start, end) in [0, 1]; found {value!r}.")
        return cls(*value)

    def factor(self, step: Step) -> float:
        """Factor on the strength at this step; 0 = off."""
        begin, after = step.index / step.count, (step.index + 1) / step.count
        # A tolerance of rounding: 3/10 must count as inside start=0.3.
        if begin < self.start - 1e-9 or after > self.end + 1e-9:
            return 0.0
        return 1.0 if self.curve is None else float(self.curve(begin))


@dataclass(frozen=True)
class Where:
    """The sites at which a control acts: shell patterns over `Site.path`, e.g. "transformer_blocks.*"."""

    patterns: tuple[str, ...] = ("*",)

    def __contains__(self, site: Site) -> bool:
        return any(fnmatch.fnmatchcase(site.path, p) for p in self.patterns)

    @classmethod
    def of(cls, value: Where | str | tuple[str, ...] | None) -> Where:
        """None = everywhere; one pattern or a tuple of them."""
        if isinstance(value, Where):
            return value
        return cls() if value is None else cls((value,) if isinstance(value, str) else tuple(value))


class Placing(TypedDict, total=False):
    """The arguments that `control(reference, strength, ...)` of every adapter takes.

    when: the part of the schedule in which it acts. mask: where in the image it acts, white = acts; one for all images
    or one for each.
    """

    when: When | tuple[float, float] | None
    mask: ImageSource | Sequence[ImageSource] | None


class Apart(Protocol):
    """A separate prediction for a control's reference: latents x0 (B, ...) with standard normal noise of the same shape
    at the level of a step, under `text` or, if None, that of this side of the guidance. `controls` may record the keys
    and values of the layers; nothing else affects the run."""

    def __call__(
        self, x0: Tensor, noise: Tensor, step: Step, controls: Sequence[Control] = (), text: Text | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class PromptPair:
    """The prompts of an edit as words over the tokens that the image attends to, one pair an image."""

    source: tuple[Words, ...]
    target: tuple[Words, ...]


@dataclass(frozen=True)
class Run:
    """What a control may need to know of one pipeline call: the backbone, the batch, the token grid, the text.

    pooled (B, P); guidance (B,) or None; grid = (rows, columns) of image tokens; in_channels of the backbone; cells
    (M,) are the numbers of the generated cells, None for all; leak: see `Control.leak`. memory: what
    controls share across the sides of guidance during one call. edit: the prompts of `Pipeline.edit`,
    where rows of the batch are source 0, target 0, source 1, ... apart: runs the network on a reference.
    """

    backbone: nn.Module
    batch: int
    grid: tuple[int, int]
    pooled: Tensor
    guidance: Tensor | None
    in_channels: int
    cells: Tensor | None = None
    leak: LowRank | None = None
    memory: dict = field(default_factory=dict)
    edit: PromptPair | None = None
    apart: Apart | None = None


@dataclass(frozen=True)
class Fill:
    """An image that is generated in part: tokens (n, N, C) of all its cells, row-major; generated (rows, columns),
    bool.

    The sequence then holds the generated cells only; the others keep their content.
    """

    tokens: Tensor
    generated: Tensor

    @property
    def cells(self) -> Tensor:
        """Numbers (M,) of the generated cells."""
        return self.generated.flatten().nonzero()[:, 0]

    def complete(self, generated: Tensor) -> Tensor:
        """All cells (B, N, C) from the generated ones (B, M, C)."""
        whole = match_batch(self.tokens, len(generated), "fill").to(generated).clone()
        whole[:, self.cells] = generated
        return whole


Act = Literal["wrap", "join", "omit", "adapt", "add", "merge", "bound", "edit"]
# What a control does -> the method that does it.
ACTS: dict[Act, str] = {
    "wrap": "around",
    "join": "streams",
    "omit": "fill",
    "adapt": "lora",
    "add": "residual",
    "merge": "merging",
    "bound": "region",
    "edit": "edit",
}


class Control:
    """One reference at one strength. Every method has a default, so a new control overrides what its paper adds."""

    @property
    def acts(self) -> frozenset[Act]:
        """What this kind of control may do: the acts whose methods its class defines."""
        classes = [vars(kind) for kind in type(self).__mro__ if kind not in (Control, object)]
        return frozenset(act for act, method in ACTS.items() if any(method in names for names in classes))

    def sized(self, size: tuple[int, int], pipe: Host) -> Control:
        """First in a call of `pipe`, which generates (height, width) in pixels: the control for that size."""
        return self

    def prepare(self, run: Run) -> Control:
        """Once per pipeline call: bring the reference to the batch, fill caches. Returns the control of this run."""
        return self

    def at(self, step: Step) -> Control | None:
        """When: the control of this step, or None if it is off."""
        return self

    def around(self, call: Call, attend: Attend) -> Tensor:
        """Wrap: the attention output, usually from `attend` with another call."""
        return attend(call)

    def streams(self) -> tuple[Stream, ...]:
        """Join: tokens that enter the sequence."""
        return ()

    def fill(self) -> Fill | None:
        """Omit: the cells that need not be generated, and what they hold. At most one control of a call."""
        return None

    def lora(self) -> LowRank | None:
        """Adapt: a low-rank update for the tokens of text and image."""
        return None

    def text_lora(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Updates of the text encoders for both sides of the guidance: a layer as its file names it -> A (r, in), and B
        (out, r) with every factor. They hold for the whole call."""
        return {}

    def leak(self) -> LowRank | None:
        """An update that this control also applies to the conditions of other controls, as official code may."""
        return None

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        """Add: a residual (B, N, dim) for the image stream after the block; query (B, H, N, D) without positions."""
        return None

    def merging(self, site: Site, tokens: Tensor, image: slice) -> Reduction | None:
        """Merge: how the layer at `site` runs on fewer tokens; tokens (B, N, C) are its input after the norm, `image`
        the rows of the noisy image. None: on all of them."""
        return None

    def region(self) -> Tensor | None:
        """Bound: where the target of an edit may differ from its source after this step, (B, N) in [0, 1] on the token
        grid; None: everywhere."""
        return None

    def edit(self, pair: PromptPair, backbone: nn.Module) -> Control:
        """Edit: the control for an edit's batch of source 0, target 0, source 1, ..., before anything is computed.
        Raises ValueError where words or layers do not fit. Controls without this act change the targets only."""
        return self

    def differs(self) -> bool:
        """In an edit: whether the target differs from its source even if the prompts are equal."""
        return True

    def recording(self) -> Control | None:
        """In an edit: the same control, recording the attention to the words as "maps"; None if it cannot."""
        return None

    def records(self) -> dict[str, Tensor]:
        """After an edit: the tensors that it recorded, by name."""
        return {}

    def negative(self) -> Control | None:
        """The same control with an empty reference, for guidance; None: absent in the unconditional pass."""
        return None

    def describe(self) -> dict:
        """The entry of a recipe, from which the control can be made again."""
        return {"method": type(self).__name__}


# Checks of a call


def check_controls(controls: Sequence[Control]) -> tuple[Control, ...]:
    """The controls of a call. Raises ValueError unless given a list of controls."""
    if not isinstance(controls, Iterable):
        raise ValueError(f"controls must be a list, controls=[...]; found {type(controls).__name__}.")
    for control in controls:
        if not isinstance(control, Control):
            raise ValueError(f"controls must be made by adapter.control(...); found {type(control).__name__}.")
    return tuple(controls)


def check_arguments(strength: object, arguments: Mapping[str, object], known: type) -> None:
    """Raises TypeError for a name that is not in the TypedDict of a call's `**arguments`, as Python does without one,
    and ValueError for a second reference in the place of the strength."""
    unknown = [name for name in arguments if name not in known.__annotations__]
    if unknown:
        raise TypeError(f"control() has no argument {unknown[0]!r}. It also takes {', '.join(known.__annotations__)}.")
    if not isinstance(strength, Real | list | tuple | Mapping) and getattr(strength, "ndim", 1):
        raise ValueError(
            f"strength, the second argument of control(), is a number; found {type(strength).__name__}. Name the "
            "argument of another reference, such as content=."
        )


def finite(name: str, value: object) -> float:
    """A finite number of Python, numpy or a 0-d tensor as a float. Raises ValueError for anything else."""
    value = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; found {value!r}.")
    return float(value)


def check_layers(run: Run, paths: Iterable[str]) -> None:
    """Raises ValueError unless the model of this call has all of these layers; without them a control has no effect."""
    here = {site.path for site in getattr(run.backbone, "sites", ())}
    unknown = next((path for path in paths if path not in here), None)
    if unknown is not None:
        raise ValueError(
            f"The model of this call has no layer {unknown!r}: the control was made for another model. Load "
            "its adapter with the pipeline of this call."
        )


def check_reach(where: Where, paths: Sequence[str]) -> None:
    """Raises ValueError for a `where` that matches none of an adapter's layers, such as a misspelt one."""
    if any(Site(path, "cross", 0) in where for path in paths):
        return
    module = next((p for p in where.patterns if any(path.startswith(f"{p}.") for path in paths)), None)
    raise ValueError(
        f"where={where.patterns} matches none of the {len(paths)} layers of this adapter, such as {paths[0]!r}."
        + (f" The layers of a module are '{module}.*'." if module else "")
    )


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ValueError unless an argument is one of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; found {value!r}.")


def match_batch(x: Tensor, batch: int, what: str) -> Tensor:
    """Rows of a reference tensor for a batch: one row serves all, n rows serve n prompts (and copies of each)."""
    if x.shape[0] == batch:
        return x
    if x.shape[0] == 1:
        return x.expand(batch, *x.shape[1:])
    if batch % x.shape[0] == 0:
        return x.repeat_interleave(batch // x.shape[0], 0)
    raise ValueError(f"{what}: {x.shape[0]} references for {batch} images. Give 1, {batch}, or a divisor of {batch}.")


MaskMode = Literal["area", "bilinear", "bicubic"]


def region_mask(mask: Tensor, grid: tuple[int, int], cells: Tensor | None = None, mode: MaskMode = "area") -> Tensor:
    """Pixel mask (B or 1, H, W) in [0, 1] -> (B or 1, 1, N, 1) on the token grid, or on `cells` of it. mode: "bilinear"
    is ComfyUI's; "bicubic" is diffusers' and may leave [0, 1]."""
    small = torch.nn.functional.interpolate(mask[:, None].float(), size=grid, mode=mode).flatten(2)
    return (small if cells is None else small[..., cells.to(small.device)])[..., None]


def check_shape(mask: Tensor, grid: tuple[int, int]) -> None:
    """Raises ValueError for a mask whose aspect ratio differs from the image's: it would be stretched."""
    (height, width), (rows, columns) = mask.shape[-2:], grid
    if abs(height * columns - width * rows) > max(rows, columns):  # one pixel of rounding is allowed
        raise ValueError(
            f"a mask of {height} x {width} (height x width) for an image of {rows} x {columns} tokens: the "
            "shapes differ. Crop or pad the mask to the image's shape."
        )


def region_levels(mask: Tensor, grid: tuple[int, int], mode: MaskMode = "area") -> dict[int, Tensor]:
    """A pixel mask on every token grid of a UNet over `grid`: N -> (B or 1, 1, N, 1). Strides of 2 round up, so that 65
    rows become 33, and N identifies the level. Raises ValueError for another aspect ratio than the image's."""
    check_shape(mask, grid)
    rows, columns = grid
    levels = {}
    while True:
        levels[rows * columns] = region_mask(mask, (rows, columns), mode=mode)
        if rows * columns == 1:
            return levels
        rows, columns = -(-rows // 2), -(-columns // 2)
