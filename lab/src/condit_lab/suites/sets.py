"""The sets of pictures that the suite measures: held-out cells, what is shown for them; drawn once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condit.controls.deadiff import DEADiff
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.data import annotators
from condit.weights.catalog import MODELS
from condit.weights.files import read_metadata, read_tensors, save_tensors
from condit_lab.icons.world import (
    GROUPS,
    HELD_OUT_STYLE,
    TRAIN_LICENCES,
    Icon,
    IconWorld,
    family,
    hash_fraction,
    on_white,
    plain_caption,
)
from condit_lab.suites.judge import is_for_judge

log = logging.getLogger(__name__)

BATCH, SAVE_EVERY = 32, 4
Split = Literal["combo", "concept", "style"]
ReferenceKind = Literal["style", "three", "unseen", "subject", "edges", "gray"]


@dataclass(frozen=True)
class Spec:
    """One set: prompts of a split's cells (label alone, or label and style), an adapter, what it is shown."""

    name: str
    split: Split
    what: str
    prompt: Literal["label", "caption"]
    adapter: str | None = None
    reference: ReferenceKind | None = None
    guidance: float | None = None
    image_guidance: float | None = None


SPECS: tuple[Spec, ...] = (
    Spec("words", "combo", "style word", "caption"),
    Spec("none", "combo", "no control", "label"),
    Spec("style", "combo", "style reference", "label", "tiny/style", "style"),
    Spec("style-guided", "combo", "style reference, image guidance 3.5", "label", "tiny/style", "style", 2.5, 3.5),
    Spec("style-three", "combo", "three style references", "label", "tiny/style", "three"),
    Spec("style-unseen", "combo", "style reference not in training", "label", "tiny/style", "unseen"),
    Spec("tokens", "combo", "style reference as tokens", "label", "tiny/style-tokens", "style"),
    Spec(
        "tokens-guided",
        "combo",
        "style reference as tokens, image guidance 3.5",
        "label",
        "tiny/style-tokens",
        "style",
        2.5,
        3.5,
    ),
    Spec("subject", "combo", "style word and subject reference", "caption", "tiny/subject", "subject"),
    Spec("edges", "combo", "style word and edges", "caption", "tiny/edges", "edges"),
    Spec("gray", "combo", "style word and gray picture", "caption", "tiny/gray", "gray"),
    Spec("concept-words", "concept", "style word", "caption"),
    Spec("concept-subject", "concept", "style word and subject reference", "caption", "tiny/subject", "subject"),
    Spec("new-none", "style", "no control", "label"),
    Spec("new-style", "style", "style reference", "label", "tiny/style", "style"),
    Spec("new-guided", "style", "style reference, image guidance 3.5", "label", "tiny/style", "style", 2.5, 3.5),
    Spec("new-tokens", "style", "style reference as tokens", "label", "tiny/style-tokens", "style"),
)


@dataclass(frozen=True)
class Cell:
    """A held-out (concept, style) and what may be shown for it, as numbers of the world's icons: three icons of the
    style, one of the style outside training, one of the concept by another vendor."""

    icon: int
    style: tuple[int, int, int]
    unseen: int
    subject: int


def choose_cells(world: IconWorld, split: Split, count: int, seed: int = 0) -> list[Cell]:
    """Up to `count` cells of a split, an order that depends on their names and the seed alone. The never-trained style
    has few concepts: they come again with other references."""
    icons = world.icons
    usable = [i for i, icon in enumerate(icons) if icon.group in GROUPS and icon.licence in TRAIN_LICENCES]
    # Icons of the never-trained style that the judge learned from are neither targets nor references.
    usable = [i for i in usable if icons[i].style != HELD_OUT_STYLE or not is_for_judge(icons[i])]
    targets = [i for i in usable if icons[i].split == split]
    targets.sort(key=lambda i: hash_fraction(f"evaluate/{seed}/{icons[i].style}/{icons[i].hex}"))
    by_style, by_base = _lists(usable, lambda i: icons[i].style), _lists(usable, lambda i: icons[i].base)
    cells: list[Cell] = []
    for turn in range(count if split == "style" else 1):
        complete = [cell for i in targets if (cell := _cell(icons, i, by_style, by_base, f"{seed}/{turn}")) is not None]
        cells += complete[: count - len(cells)]
        if not complete or len(cells) == count:
            break
    return cells


def _cell(
    icons: Sequence[Icon], i: int, by_style: Mapping[str, list[int]], by_base: Mapping[str, list[int]], key: str
) -> Cell | None:
    """The cell of icon i, or None where the world has too little to show for it."""
    icon, rng = icons[i], random.Random(f"{key}/{icons[i].style}/{icons[i].hex}")
    others = [j for j in by_style[icon.style] if icons[j].base != icon.base]
    unseen = [j for j in others if icons[j].split != "train"]
    known = unseen if icon.style == HELD_OUT_STYLE else [j for j in others if icons[j].split == "train"]
    # A held-out concept has no drawing in training: its subject reference is as new as the concept.
    split = "concept" if icon.split == "concept" else "train"
    subjects = [
        j for j in by_base[icon.base] if icons[j].split == split and family(icons[j].style) != family(icon.style)
    ]
    if len(known) < 3 or not unseen or not subjects:
        return None
    first, second, third = rng.sample(known, 3)
    return Cell(i, (first, second, third), rng.choice(unseen), rng.choice(subjects))


def _lists(items: Iterable[int], key: Callable[[int], str]) -> dict[str, list[int]]:
    lists: dict[str, list[int]] = {}
    for item in items:
        lists.setdefault(key(item), []).append(item)
    return lists


def pictures(world: IconWorld, indices: Iterable[int]) -> Tensor:
    """Real icons on white, (N, 3, 128, 128) uint8."""
    return torch.stack([torch.from_numpy(on_white(world.rgba(i))).permute(2, 0, 1) for i in indices])


def shown(world: IconWorld, cell: Cell, reference: ReferenceKind) -> list[Image.Image]:
    """What the adapter is given for a cell: icons, or the true icon's lines or gray picture."""
    numbers = {"style": cell.style[:1], "three": cell.style, "unseen": (cell.unseen,), "subject": (cell.subject,)}
    images = [Image.fromarray(world.rgba(i)) for i in numbers.get(reference, (cell.icon,))]
    annotate = {"edges": annotators.lines, "gray": annotators.gray}.get(reference)
    return images if annotate is None else [annotate(images[0])]


def prompt_of(icon: Icon, spec: Spec) -> str:
    return plain_caption(icon) if spec.prompt == "caption" else icon.label


def load_adapters(names: Iterable[str], pipe: Any) -> dict[str, IPAdapter | OminiControl | DEADiff]:
    """Those that are here; the caller tells which are not."""
    classes = {"ip-adapter": IPAdapter, "omini": OminiControl, "deadiff": DEADiff}
    return {name: classes[MODELS[name].kind].load(name, pipe) for name in sorted(set(names)) if name in MODELS}


def make_controls(adapter: Any, references: Sequence[Sequence[Image.Image]], spec: Spec) -> list:
    """One control for a batch; every picture its own references."""
    if isinstance(adapter, OminiControl):
        # Edges and gray are made here, so that the same map is shown and measured.
        return [adapter.control([r[0] for r in references], annotate=False)]
    return [adapter.control([list(r) for r in references])]


def draw_set(
    pipe: Any,
    adapter: Any,
    spec: Spec,
    world: IconWorld,
    cells: Sequence[Cell],
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 20,
    tell: Callable[[str], None] = log.info,
) -> tuple[Tensor, float]:
    """The set's pictures (N, 3, 128, 128) uint8 and the seconds they took. Picture i starts from the noise of seed + i
    in every set, so sets differ by their controls alone. Kept in folder/NAME.safetensors: a broken run goes on."""
    mark = _mark(pipe, adapter, spec, world, cells, seed, steps)

    def draw(start: int) -> list[Image.Image]:
        part = cells[start : start + BATCH]
        controls = []
        if spec.reference is not None:
            controls = make_controls(adapter, [shown(world, cell, spec.reference) for cell in part], spec)
        return pipe(
            [prompt_of(world.icons[cell.icon], spec) for cell in part],
            controls=controls,
            seed=seed + start,
            guidance_scale=spec.guidance,
            image_guidance_scale=spec.image_guidance,
            num_inference_steps=steps,
        ).images

    return draw_kept(folder / f"{spec.name}.safetensors", mark, len(cells), draw, tell=tell)


def draw_kept(
    file: Path, mark: str, count: int, draw: Callable[[int], list[Image.Image]], *, tell: Callable[[str], None]
) -> tuple[Tensor, float]:
    """`count` pictures (N, 3, 128, 128) uint8 and the seconds they took, kept in `file` under `mark`, which says all
    that they depend on. draw(start) makes the next BATCH of them; what an earlier run kept isn't drawn again."""
    images, seconds = _kept(file, mark)
    for start in range(len(images), count, BATCH):
        began = time.perf_counter()
        drawn = draw(start)
        new = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in drawn])
        images, seconds = torch.cat([images, new]), seconds + time.perf_counter() - began
        if len(images) == count or (start // BATCH + 1) % SAVE_EVERY == 0:
            save_tensors(file, {"images": images}, {"mark": mark, "seconds": seconds})
            tell(f"{file.stem}: {len(images)} of {count} pictures, {seconds:.0f} s")
    return images, seconds


def mark_of(key: object) -> str:
    """A short hash of everything that pictures depend on."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def cell_names(world: IconWorld, cells: Sequence[Cell]) -> list[list[str]]:
    """The icons of each cell by name, for a mark: numbers change with the world's filters."""

    def name(i: int) -> str:
        return f"{world.icons[i].style}/{world.icons[i].hex}"

    return [[name(c.icon), *map(name, c.style), name(c.unseen), name(c.subject)] for c in cells]


def _mark(pipe: Any, adapter: Any, spec: Spec, world: IconWorld, cells: Sequence[Cell], seed: int, steps: int) -> str:
    """Everything that the pictures depend on, so that an old file is never taken for this set."""
    names = cell_names(world, cells)
    return mark_of([drawn_by(pipe), getattr(adapter, "hash", ""), asdict(spec), names, seed, steps])


def drawn_by(pipe: Any) -> list:
    """A pipeline for a mark: its weights and its own settings."""
    own = (getattr(pipe.parts, name, None) for name in ("shift", "eta", "guidance"))
    return [pipe.parts.hash, str(pipe.dtype), *own]


def _kept(file: Path, mark: str) -> tuple[Tensor, float]:
    """What an earlier run drew of the same set; nothing if it was another."""
    if file.is_file():
        metadata = read_metadata(file)
        if metadata.get("mark") == mark:
            return read_tensors(file)["images"], float(metadata["seconds"])
        log.info("%s was drawn by another model or from other cells; drawn again", file.name)
    return torch.empty(0, 3, 128, 128, dtype=torch.uint8), 0.0
