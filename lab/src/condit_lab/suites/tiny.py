"""The suite of the embedded model: draws held-out pictures, measures them, writes `evaluation.json` and a page.

What is measured, how, and with which result: docs/tiny.md. Every figure stands beside its ceiling and its baselines.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from condit.data.files import atomic_write
from condit.encoders.clip import CONCEPT, embed_image, embed_text, token_ids
from condit.rulers.judge import Judge, load_judge, read_card
from condit_lab.icons.world import TRAIN_LICENCES, IconWorld, sample_path
from condit_lab.suites import rows as tables
from condit_lab.suites.measures import thumbnails
from condit_lab.suites.report import write_page
from condit_lab.suites.rows import FigureRow, Scene
from condit_lab.suites.sets import GROUPS, SPECS, Spec, Split, choose_cells, draw_set, load_adapters, pictures

if TYPE_CHECKING:
    from condit.drawing.pipeline import Pipeline

log = logging.getLogger(__name__)

QUICK = 64


@dataclass
class Bench:
    """What measures: the world, the model under test with its CLIP, the judge and the styles
    among which it chooses, every label's embedding (C, 192)."""

    world: IconWorld
    pipe: Pipeline
    judge: Judge
    among: list[str]
    labels: list[str]
    texts: Tensor
    skipped: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def evaluate(
    out: str | Path,
    *,
    data: str | Path | None = None,
    count: int = 512,
    seed: int = 0,
    model: str = "tiny",
    quick: bool = False,
    sets: Collection[str] | None = None,
    steps: int = 20,
    bf16: bool = False,
    eta: float | None = None,
    guidance: float | None = None,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Measure a model on up to `count` held-out pictures a set; returns what stands in `out/evaluation.json`.

    data: an icon world; None takes the packed sample, which holds few held-out icons. quick: 64 pictures, to see that
    it works. sets: names of `SPECS` to draw, None = all. bf16: draw in bfloat16. eta, guidance: the
    pipeline's, None: the model's own. Pictures are kept under `out/images`:
    a broken run goes on."""
    from condit.drawing.loading import load

    began, folder = time.perf_counter(), Path(out)
    count = min(count, QUICK) if quick else count
    specs = _wanted(sets)
    if count < 1:
        raise ValueError(f"count is the number of images in each set and must be at least 1; found {count}.")
    world = IconWorld.open(open_world(data))
    pipe = load(model, dtype=torch.bfloat16 if bf16 else None)
    own = {name: value for name, value in (("eta", eta), ("guidance", guidance)) if value is not None}
    if own:
        pipe.parts = replace(pipe.parts, **own)
    bench = make_bench(world, pipe)
    scenes = draw_scenes(bench, specs, folder / "images", count=count, seed=seed, steps=steps, tell=tell)
    if not scenes:
        raise ValueError(
            f"{data or 'The sample'} holds no held-out icons. Build the whole world: condit data icons --out DIR."
        )
    tell("measuring")
    started = time.perf_counter()
    rows, threshold = measure(bench, scenes)
    bench.seconds["measuring"] = round(time.perf_counter() - started, 1)
    bench.seconds["all"] = round(time.perf_counter() - began, 1)
    result = {
        "model": model,
        "hash": pipe.parts.hash,
        "command": _command(model, data, count, seed, steps, sets, bf16, own),
        "count": count,
        "seed": seed,
        "steps": steps,
        "data": {
            "icons": len(world),
            "labels": len(bench.labels),
            "cells": {scene.split: len({cell.icon for cell in scene.cells}) for scene in scenes},
        },
        "judge": {"among": bench.among, "card": read_card()},
        "near_duplicate_below": round(threshold, 5),
        "skipped": bench.skipped,
        "seconds": bench.seconds,
        "rows": [asdict(row) for row in rows],
        "criteria": tables.criteria(rows),
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    atomic_write(folder / "evaluation.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_page(folder, result, scenes, world)
    tell(f"{folder / 'index.html'}: {bench.seconds['all']:.0f} s")
    return result


def _wanted(sets: Collection[str] | None) -> list[Spec]:
    known = [spec.name for spec in SPECS]
    if sets is not None and (strange := sorted(set(sets) - set(known))):
        raise ValueError(f"There is no set {strange[0]!r}. Choose from: {', '.join(known)}.")
    return [spec for spec in SPECS if sets is None or spec.name in sets]


def open_world(data: str | Path | None) -> str | Path:
    """The given world, or the packed sample."""
    if data is not None:
        return data
    if not sample_path().exists():
        raise ValueError(
            "An icon world is needed. Build one with condit data icons --out DIR and pass it with --data DIR."
        )
    log.warning("--data is not given. The packed sample has few held-out icons, so the intervals are wide.")
    return sample_path()


def _command(
    model: str,
    data: object,
    count: int,
    seed: int,
    steps: int,
    sets: Collection[str] | None,
    bf16: bool,
    own: Mapping[str, float | None],
) -> str:
    """The command line without the folder's own name; what only Python can ask for stands behind it."""
    line = f"condit evaluate {model}{' --data ICONS' if data else ''} --count {count} --seed {seed}"
    line += "" if sets is None else f" --sets {','.join(sets)}"
    line += " --bf16" if bf16 else ""
    line += "".join(f" --{name} {value:g}" for name, value in own.items() if value is not None)
    return f"{line}  # steps={steps}" if steps != 20 else line


def make_bench(world: IconWorld, pipe: Pipeline, judge: Judge | None = None) -> Bench:
    """The labels of what the model may know (no people, flags, symbols). Equal labels of two concepts are one label:
    drawing either is a hit."""
    labels = sorted({icon.label for icon in world.icons if icon.group in GROUPS})
    judge = judge or load_judge()
    # The share-alike sets are never asked for and were never shown to the model; with them among the answers a third of
    # the real noto-mono icons pass for openmoji's outlines.
    drawn = {icon.style for icon in world.icons if icon.licence in TRAIN_LICENCES}
    among = [style for style in judge.styles if style in drawn]
    return Bench(world, pipe, judge, among, labels, _embed_labels(pipe, labels))


@torch.no_grad()
def _embed_labels(pipe: Any, labels: list[str]) -> Tensor:
    ids = token_ids(pipe.parts.text.tokenizer, labels)
    embeddings = [embed_text(pipe.image.clip, part.to(pipe.device))[1][:, CONCEPT] for part in ids.split(256)]
    return torch.cat(embeddings).float().cpu()


@torch.no_grad()
def _embed_pictures(pipe: Any, images: Tensor) -> Tensor:
    embeddings = [
        embed_image(pipe.image.clip, _signed(part).to(pipe.device))[1][:, CONCEPT] for part in images.split(64)
    ]
    return torch.cat(embeddings).float().cpu()


@torch.no_grad()
def _through_latent(pipe: Any, images: Tensor) -> Tensor:
    """Encoded and decoded by the model's own autoencoder: what the latent alone costs."""
    parts = []
    for part in images.split(64):
        tokens, grid = pipe.encode_condition(_signed(part).to(pipe.device))
        decoded = pipe.decode(tokens, output_type="pt").float().cpu()
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def draw_scenes(
    bench: Bench,
    specs: Collection[Spec],
    folder: Path,
    *,
    count: int,
    seed: int = 0,
    steps: int = 20,
    tell: Callable[[str], None] = log.info,
) -> list[Scene]:
    """Every split with the sets that can be drawn; what is missing is noted in bench.skipped."""
    adapters = load_adapters((spec.adapter for spec in specs if spec.adapter), bench.pipe)
    splits: tuple[Split, ...] = ("combo", "concept", "style")
    scenes = []
    for split in splits:
        chosen = [spec for spec in specs if spec.split == split]
        cells = choose_cells(bench.world, split, count, seed) if chosen else []
        scene = Scene(split, cells, [bench.world.icons[cell.icon] for cell in cells])
        for spec in chosen:
            why = None if cells else f"no held-out icons of split {split!r} with references"
            if why is None and spec.adapter and spec.adapter not in adapters:
                why = f"no adapter {spec.adapter}"
            if why is not None:
                bench.skipped.append({"set": spec.name, "why": why})
                tell(f"{spec.name}: left out, {why}")
                continue
            scene.images[spec.name], seconds = draw_set(
                bench.pipe,
                adapters.get(spec.adapter or ""),
                spec,
                bench.world,
                cells,
                folder,
                seed=seed,
                steps=steps,
                tell=tell,
            )
            scene.specs[spec.name], bench.seconds[spec.name] = spec, round(seconds, 1)
        if scene.specs:
            scenes.append(scene)
    return scenes


def measure(bench: Bench, scenes: Collection[Scene]) -> tuple[list[FigureRow], float]:
    """All rows, and the distance below which a picture counts as a near-duplicate of a training icon."""
    world = bench.world
    training = [i for i, icon in enumerate(world.icons) if _trained(icon)]
    bank = torch.cat([thumbnails(pictures(world, part)) for part in _parts(training)])
    for scene in scenes:
        scene.images["real"] = pictures(world, (cell.icon for cell in scene.cells))
        scene.images["latent"] = _through_latent(bench.pipe, scene.images["real"])
        scene.images["other"] = pictures(world, (cell.subject for cell in scene.cells))
        if scene.split != "concept":
            scene.images["copy"] = pictures(world, (cell.style[0] for cell in scene.cells))
        for name, images in scene.images.items():
            scene.styles[name] = bench.judge.probabilities(images, bench.among)
            scene.concepts[name] = _embed_pictures(bench.pipe, images)
        for name in scene.specs:
            scene.scores[name] = tables.sheet_scores(scene, name, bench.judge.styles, bench.labels, bench.texts)
    threshold = tables.near_duplicate_threshold(_yardstick(world), bank)
    rows = []
    for scene in scenes:
        rows += tables.style_rows(scene, bench.judge.styles)
        rows += tables.retrieval_rows(scene, bench.labels, bench.texts)
        rows += tables.leakage_rows(scene, world.icons, bench.labels, bench.texts)
        rows += tables.edge_similarity_rows(scene)
        rows += tables.near_duplicate_rows(scene, bank, threshold)
        rows += tables.edge_f1_rows(scene, world)
        rows += tables.gray_rows(scene)
        rows += tables.subject_rows(scene)
    return rows, threshold


def _trained(icon: Any) -> bool:
    return icon.split == "train" and icon.group in GROUPS and icon.licence in TRAIN_LICENCES


def _yardstick(world: IconWorld) -> Tensor:
    """Thumbnails of the real icons of held-out concepts: drawings that no training icon repeats but by chance."""
    chosen = [i for i, icon in enumerate(world.icons) if icon.split == "concept" and icon.group in GROUPS]
    chosen = [i for i in chosen if world.icons[i].licence in TRAIN_LICENCES]
    if not chosen:
        raise ValueError(
            "This world has no held-out concepts, which the threshold of near-duplicates needs. Build the whole world."
        )
    return torch.cat([thumbnails(pictures(world, part)) for part in _parts(chosen)])


def _parts(indices: list[int], size: int = 512) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def write_table(result: Mapping[str, Any], path: str | Path) -> Path:
    """The figures as Markdown into `path`: between the lines `<!-- evaluation -->` and `<!-- /evaluation -->` where it
    has them, else as the whole file."""
    return write_between(path, tables.markdown(result), "evaluation")


def write_between(path: str | Path, body: str, mark: str) -> Path:
    """`body` between the lines `<!-- mark -->` and `<!-- /mark -->` of `path`, or as a new file. ValueError for a file
    without them."""
    path = Path(path)
    first, last = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    # Whole lines: a page may also speak of its marks.
    place = re.search(rf"^{re.escape(first)}\n(.*?)^{re.escape(last)}$", old, re.M | re.S)
    if old and place is None:
        raise ValueError(f"{path} has no lines {first} and {last}. Put them where the figures belong.")
    if place is not None:
        body = f"{old[: place.start(1)]}\n{body}\n{old[place.end(1) :]}"
    return atomic_write(path, lambda file: file.write_text(body, encoding="utf-8"))
