"""The methods of style transfer that are compared: a table of values, one row a method.

A row says how a cell's pictures come about at a strength. Most are drawn by a model under controls; some are edited
from the pictures that the model draws without a control. A method on another model is one more row, with its model's
own `blank` (no control) and `baseline` (the plain adapter over its strengths).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condit.controls.control import Control
from condit.controls.instantstyle import preset
from condit.controls.ip_adapter import IPReference
from condit.controls.stylealigned import StyleAligned
from condit.controls.styleid import StyleID
from condit.encoders.clip import CONCEPT
from condit.encoders.image import TinyTextTower
from condit_lab.icons.world import Icon, IconWorld, plain_caption
from condit_lab.suites.adain import AdaIN
from condit_lab.suites.sets import Cell, pictures, shown

STYLE = "tiny/style"
UNET, UNET_STYLE, UNET_PLUS, DEADIFF = "tiny-unet", "tiny-unet/style", "tiny-unet/plus", "tiny-unet/deadiff"


@dataclass(frozen=True)
class CellInputs:
    """What there is for some cells: the icons that are asked for; the pictures that are shown, one each, and their
    icons; all of it read once. blank: the pictures without a control, for methods that edit them."""

    wanted: Sequence[Icon]
    references: Sequence[Image.Image]
    icons: Sequence[Icon]
    blank: Sequence[Image.Image] = ()


@dataclass(frozen=True)
class Stage:
    """A model with what its methods need: adapters by name, the style block's layers (of the probe), AdaIN."""

    pipe: Any
    adapters: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    adain: AdaIN | None = None


Make = Callable[[Stage, CellInputs, float], Sequence[Control]]
Edit = Callable[[Stage, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Method:
    """One row. make: the controls of a batch at a strength; edit(stage, blank's pictures, references, true icons,
    strength), uint8 (N, 3, H, W): without drawing. needs: what the stage must have. prompt "label" leaves the style to
    the reference, "caption" says it. shows "subject": the prompt's concept by another hand, not a style. edits: whether
    it draws from the blank's pictures."""

    name: str
    what: str
    make: Make | None = None
    edit: Edit | None = None
    strengths: tuple[float, ...] = (1.0,)
    needs: str | None = None
    prompt: Literal["label", "caption"] = "label"
    shows: Literal["style", "subject"] = "style"
    model: str = "tiny"
    blank: str = "none"
    baseline: str | None = "plain"
    edits: bool = False

    def prompts(self, icons: Sequence[Icon]) -> list[str]:
        return [plain_caption(icon) if self.prompt == "caption" else icon.label for icon in icons]

    def missing(self, stage: Stage) -> str | None:
        """Why this method cannot run here, or None."""
        if self.needs == "adain":
            return None if stage.adain is not None else "no weights of AdaIN; give their folder: --adain DIR"
        if self.needs is None or self.needs in stage.adapters:
            return None
        return f"no adapter {self.needs}"


def look(world: IconWorld, cells: Sequence[Cell], shows: Literal["style", "subject"] = "style") -> CellInputs:
    """The references of the cells. A style's is an icon of it, of another concept, that no training has seen."""
    kind: Literal["unseen", "subject"] = "unseen" if shows == "style" else "subject"
    numbers = [cell.unseen if shows == "style" else cell.subject for cell in cells]
    references = [shown(world, cell, kind)[0] for cell in cells]
    return CellInputs([world.icons[c.icon] for c in cells], references, [world.icons[i] for i in numbers])


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def true_icons(world: IconWorld, cells: Sequence[Cell]) -> Tensor:
    return pictures(world, (cell.icon for cell in cells))


def reference_icons(world: IconWorld, cells: Sequence[Cell], shows: Literal["style", "subject"] = "style") -> Tensor:
    return pictures(world, (cell.unseen if shows == "style" else cell.subject for cell in cells))


# How each row makes its controls. A row of another model hands its own adapter: partial(plain, adapter="NAME").


def nothing(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    return []


def plain(stage: Stage, given: CellInputs, strength: float, adapter: str = STYLE) -> list[IPReference]:
    """IP-Adapter at lambda = strength."""
    return [stage.adapters[adapter].control(list(given.references), strength=strength)]


def at_sites(
    stage: Stage, given: CellInputs, strength: float, sites: tuple[str, ...], adapter: str = STYLE
) -> list[Control]:
    """The same at some layers only."""
    return [stage.adapters[adapter].control(list(given.references), strength=strength, where=sites)]


def style_block(stage: Stage, given: CellInputs, strength: float, adapter: str = STYLE) -> list[Control]:
    """The same at the layers of the style block (InstantStyle, section 3.2)."""
    if not stage.sites:
        raise ValueError("The style block needs its layers. Run the block probe first, or name them with --sites.")
    return at_sites(stage, given, strength, stage.sites, adapter)


def subtracted(
    stage: Stage, given: CellInputs, strength: float, adapter: str = STYLE, part: slice | None = None
) -> list[IPReference]:
    """Content subtraction at lambda = 1: the adapter is fed e - s c, c the text embedding of the reference's own label
    (InstantStyle, section 3.2). part: of the embedding; None is all of it."""
    pipe = stage.pipe
    part = part or pipe.image.embedding
    features = pipe.image(pipe.read_images(list(given.references), None)).clone()
    words = TinyTextTower(pipe.image, pipe.parts.text.tokenizer)([icon.label for icon in given.icons])
    # Only where the feature is a CLIP embedding: the statistics of middle layers have no twin in the text tower.
    features[:, part] -= strength * words[:, part].to(features)
    return [stage.adapters[adapter].reference(features.to(pipe.dtype), 1.0)]


def in_preset(
    stage: Stage, given: CellInputs, strength: float, name: str = "style", adapter: str = STYLE
) -> list[Control]:
    """The blocks of a preset, which SDXL's names address (InstantStyle)."""
    where = preset(name, stage.pipe.backbone)
    return [stage.adapters[adapter].control(list(given.references), strength=strength, where=where)]


def deadiff_style(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    """Style of the reference; the content layers see zeros, as released."""
    return [stage.adapters[DEADIFF].control(list(given.references), strength=strength)]


def deadiff_content(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    """Content of the reference; the style layers see zeros, as released."""
    return [stage.adapters[DEADIFF].control(content=list(given.references), strength=strength)]


def subject_tokens(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    return [stage.adapters["tiny/subject"].control(list(given.references), annotate=False)]


def style_tokens(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    """OminiControl with the style's reference as tokens of the sequence."""
    return [stage.adapters["tiny/style-tokens"].control(list(given.references), strength=strength, annotate=False)]


def aligned(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    """StyleAligned; strength is the weight of the reference's keys."""
    return [StyleAligned(list(given.references), strength)]


def injected(stage: Stage, given: CellInputs, strength: float) -> list[Control]:
    """StyleID on the pictures drawn without a control; strength is the share of the injected output."""
    return [StyleID(list(given.references), strength, content=list(given.blank))]


# How the rows that draw nothing make their pictures.


def by_adain(stage: Stage, blank: Tensor, references: Tensor, true: Tensor, strength: float) -> Tensor:
    """AdaIN on the pictures drawn without a control."""
    if stage.adain is None:
        raise ValueError("AdaIN needs its weights. Give their folder: --adain DIR.")
    parts = zip(blank.split(16), references.split(16), strict=True)
    stylised = torch.cat([stage.adain(a.float() / 255, b.float() / 255, strength) for a, b in parts])
    return (stylised * 255).round().to(torch.uint8)


def copied(stage: Stage, blank: Tensor, references: Tensor, true: Tensor, strength: float) -> Tensor:
    return references


def real(stage: Stage, blank: Tensor, references: Tensor, true: Tensor, strength: float) -> Tensor:
    return true


_on_unet = partial(Method, model=UNET, blank="unet-none", baseline="unet-plain")
METHODS: tuple[Method, ...] = (
    Method("none", "no control", nothing, baseline=None),
    Method("words", "style word, no reference", nothing, prompt="caption"),
    Method("plain", "plain IP-Adapter", plain, strengths=(0.3, 0.5, 0.7, 1.0, 1.5, 2.0), needs=STYLE),
    Method("subtract", "content subtraction", subtracted, strengths=(0.0, 0.25, 0.5, 0.75, 1.0), needs=STYLE),
    Method(
        "subtract-concept",
        "content subtraction, concept half only",
        # The half of the embedding that was trained on what is drawn; that on how stays whole.
        partial(subtracted, part=CONCEPT),
        strengths=(0.5, 1.0),
        needs=STYLE,
    ),
    Method("block", "attention at the style block only", style_block, strengths=(1.0, 2.0, 3.0), needs=STYLE),
    Method("adain", "AdaIN on the picture without control", edit=by_adain, strengths=(0.5, 1.0), needs="adain"),
    Method("copy", "copying the reference", edit=copied),
    Method("real", "the true icon", edit=real),
    Method(
        "subject",
        "plain IP-Adapter shown the subject",
        plain,
        strengths=(0.5, 1.0, 2.0),
        needs=STYLE,
        shows="subject",
        baseline=None,
    ),
    Method(
        "subject-tokens",
        "OminiControl shown the subject",
        subject_tokens,
        needs="tiny/subject",
        shows="subject",
        baseline=None,
    ),
    # On the architecture that the papers are about, each against its own adapter's curve.
    _on_unet("unet-none", "UNet, no control", nothing, baseline=None),
    _on_unet(
        "unet-plain",
        "UNet, plain IP-Adapter",
        partial(plain, adapter=UNET_STYLE),
        strengths=(0.3, 0.5, 0.7, 1.0, 1.5, 2.0),
        needs=UNET_STYLE,
    ),
    _on_unet(
        "unet-subtract",
        "UNet, content subtraction",
        partial(subtracted, adapter=UNET_STYLE),
        strengths=(0.25, 0.5, 0.75, 1.0),
        needs=UNET_STYLE,
    ),
    _on_unet(
        "unet-preset",
        "UNet, InstantStyle's style block",
        partial(in_preset, adapter=UNET_STYLE),
        strengths=(1.0, 2.0, 3.0),
        needs=UNET_STYLE,
    ),
    _on_unet(
        "unet-plus",
        "UNet, IP-Adapter plus, trained by reconstruction",
        partial(plain, adapter=UNET_PLUS),
        strengths=(0.3, 0.5, 1.0),
        needs=UNET_PLUS,
    ),
    _on_unet("unet-deadiff", "UNet, DEADiff", deadiff_style, strengths=(0.5, 1.0, 1.5), needs=DEADIFF),
    _on_unet(
        "unet-subject-plus",
        "UNet, IP-Adapter plus shown the subject",
        partial(plain, adapter=UNET_PLUS),
        needs=UNET_PLUS,
        shows="subject",
        baseline=None,
    ),
    _on_unet(
        "unet-subject-deadiff",
        "UNet, DEADiff's content shown the subject",
        deadiff_content,
        needs=DEADIFF,
        shows="subject",
        baseline=None,
    ),
)


_on_pixart = partial(Method, model="tiny-pixart", blank="pixart-none", baseline=None)
# `condit bench style`: those of a style, and the baselines without training on every embedded model.
BENCH: tuple[Method, ...] = (
    *(method for method in METHODS if method.shows == "style" and method.name != "subtract-concept"),
    Method("tokens", "OminiControl, style tokens", style_tokens, strengths=(0.5, 1.0), needs="tiny/style-tokens"),
    Method("aligned", "StyleAligned", aligned, strengths=(0.3, 1.0)),
    Method("styleid", "StyleID", injected, strengths=(0.5, 1.0), edits=True),
    _on_unet("unet-aligned", "UNet, StyleAligned", aligned, strengths=(1.0, 2.0)),
    _on_unet("unet-styleid", "UNet, StyleID", injected, strengths=(0.5, 1.0), edits=True),
    _on_pixart("pixart-none", "PixArt, no control", nothing),
    _on_pixart("pixart-aligned", "PixArt, StyleAligned", aligned, strengths=(0.3, 1.0)),
    _on_pixart("pixart-styleid", "PixArt, StyleID", injected, strengths=(0.5, 1.0), edits=True),
)


def choose(names: Sequence[str] | None, table: Sequence[Method] = METHODS) -> list[Method]:
    """The named methods (None: all) with the blank and the baseline that each is held against, in the table's order."""
    known = {method.name: method for method in table}
    wanted = list(known) if names is None else list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"There is no method {name!r}. Choose from: {', '.join(known)}.")
    for name in list(wanted):
        wanted += [known[name].blank, *([known[name].baseline] if known[name].baseline else [])]
    return [method for method in table if method.name in wanted]


def with_strengths(methods: Sequence[Method], given: Sequence[str]) -> list[Method]:
    """Methods at other strengths: "0.3,1" for all that have strengths, "plain=0.3,1" for one. Raises ValueError for
    anything else."""
    by_name = {method.name: method for method in methods}
    for entry in given:
        name, _, values = entry.rpartition("=")
        try:
            numbers = tuple(sorted({float(x) for x in values.split(",")}))
        except ValueError:
            numbers = ()
        if not numbers or not np.isfinite(numbers).all():
            raise ValueError(f"Strengths must be numbers, as in 0.3,0.7,1 or plain=0.3,0.7,1; found {entry!r}.")
        if name and name not in by_name:
            raise ValueError(f"Strengths are given for {name!r}, which is not among the methods: {', '.join(by_name)}.")
        for method in methods:
            if method.name == name or (not name and len(method.strengths) > 1):
                by_name[method.name] = replace(by_name[method.name], strengths=numbers)
    return list(by_name.values())
