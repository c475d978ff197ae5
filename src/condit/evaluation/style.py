"""The evaluation of style transfer: every method as a curve over its strength, against the plain adapter's curve.

Protocol, figures and limits: docs/papers/style-evaluation.md.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from condit.data.files import atomic_write
from condit.data.icons import IconWorld
from condit.evaluation import sets
from condit.evaluation import style_rows as tables
from condit.evaluation.adain import AdaIN
from condit.evaluation.sets import Cell, choose_cells
from condit.evaluation.style_measures import retrieval_chance
from condit.evaluation.style_methods import (
    METHODS,
    Method,
    Shown,
    Stage,
    at_sites,
    choose,
    look,
    reference_icons,
    true_icons,
    with_strengths,
)
from condit.evaluation.style_report import write_page
from condit.evaluation.tiny import open_world

log = logging.getLogger(__name__)

QUICK, PROBE, BLOCK = 16, 16, 2  # pictures of a quick run, of the probe; layers of a style block
Key = tuple[str, float]


@dataclass
class Study:
    """One run: the cells, where pictures are kept, the models by name, and what was drawn so far."""

    world: IconWorld
    cells: Sequence[Cell]
    folder: Path
    seed: int
    steps: int
    stages: dict[str, Stage]
    tell: Callable[[str], None]
    images: dict[Key, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


def evaluate_style(
    out: str | Path,
    *,
    data: str | Path | None = None,
    count: int = 256,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    strengths: Sequence[str] = (),
    split: Literal["combo", "style"] = "combo",
    sites: Sequence[str] = (),
    adain: str | Path | None = None,
    quick: bool = False,
    steps: int = 20,
    table: Sequence[Method] = METHODS,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Measure methods of style transfer on up to `count` held-out (concept, style) pairs; returns what stands in
    `out/style.json`. Pictures are kept under `out/images`: a broken run goes on.

    methods: names of `table`, None = all that can run; each comes with its no control and its baseline. strengths:
    "0.3,1" or "plain=0.3,1". sites: the layers of the style block; without them the block probe finds them on other
    pairs. split: held-out combinations, or the never-trained style. ValueError where a method asked for cannot run."""
    began, folder = time.perf_counter(), Path(out)
    chosen = with_strengths(choose(methods, table), strengths)
    count = min(count, QUICK) if quick else count
    if count < 2:
        raise ValueError(f"count is the number of pictures a method, at least 2; found {count}")
    vgg = None if adain is None and "adain" not in (methods or ()) else AdaIN.load(adain)
    world = IconWorld.open(open_world(data))
    cells, probed = choose_pairs(world, split, count, seed)
    study = Study(world, cells, folder / "images", seed, steps, make_stages(chosen, vgg), tell)
    chosen = runnable(study, chosen, asked=methods or ())
    ruler = tables.make_ruler(world, study.stages["tiny"].pipe)
    probe: list[dict[str, Any]] = []
    if any(method.name == "block" for method in chosen):
        found, probe = (tuple(sites), []) if sites else probe_blocks(study, ruler, probed)
        study.stages["tiny"] = replace(study.stages["tiny"], sites=found)
    for method in chosen:
        for strength in method.strengths:
            study.images[method.name, strength] = make_pictures(study, method, strength)
    tell("measuring")
    started = time.perf_counter()
    given = {shows: make_given(study, ruler, shows) for shows in {method.shows for method in chosen}}
    values = measure(study, ruler, chosen, given)
    shows = {method.name: method.shows for method in chosen}
    clusters = next(iter(given.values())).clusters
    of_style = {key: value for key, value in values.items() if shows[key[0]] == "style"}
    compared = tables.comparisons(
        of_style, clusters, {m.name: m.baseline for m in chosen}, {m.name: m.blank for m in chosen}
    )
    study.seconds["measuring"] = round(time.perf_counter() - started, 1)
    study.seconds["all"] = round(time.perf_counter() - began, 1)
    result = {
        "command": command_line(data, count, seed, methods, strengths, split, sites, adain, steps),
        "hash": study.stages["tiny"].pipe.parts.hash,
        "split": split,
        "n": len(cells),
        "concepts": len(set(clusters)),
        "styles": len({world.icons[cell.icon].style for cell in cells}),
        "seed": seed,
        "steps": steps,
        "methods": [
            {"name": m.name, "what": m.what, "baseline": m.baseline, "blank": m.blank, "model": m.model} for m in chosen
        ],
        "shows": shows,
        "swept": [m.name for m in chosen if len(m.strengths) > 1],
        "measures": [asdict(m) for m in tables.MEASURES],
        "retrieval_chance": retrieval_chance([world.icons[cell.icon].style for cell in cells]),
        "rows": tables.as_json(tables.rows(values, clusters, shows)),
        "comparisons": tables.as_json(compared),
        "sites": list(study.stages["tiny"].sites),
        "probe": probe,
        "rulers": tables.check_rulers(ruler, world),
        "skipped": study.skipped,
        "seconds": study.seconds,
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    atomic_write(folder / "style.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_page(folder, result, study.images, values, given)
    tell(f"{folder / 'index.html'}: {study.seconds['all']:.0f} s")
    return result


def choose_pairs(
    world: IconWorld, split: Literal["combo", "style"], count: int, seed: int
) -> tuple[list[Cell], list[Cell]]:
    """Up to `count` held-out pairs to evaluate and some others for the block probe."""
    spare = min(PROBE, count)
    cells = choose_cells(world, split, count + spare, seed)
    kept = min(count, max(len(cells) - spare, len(cells) // 2))
    if kept < 2:
        raise ValueError(f"this world has {len(cells)} held-out icons of split {split!r}; condit data icons builds it")
    return cells[:kept], cells[kept:]


def command_line(
    data: object,
    count: int,
    seed: int,
    methods: Sequence[str] | None,
    strengths: Sequence[str],
    split: str,
    sites: Sequence[str],
    adain: object,
    steps: int,
) -> str:
    """The command line without folders' own names; what only Python can ask for stands behind it."""
    line = f"condit evaluate style{' --data ICONS' if data else ''} --count {count} --seed {seed}"
    line += "" if methods is None else f" --methods {','.join(methods)}"
    line += "".join(f" --strengths {entry}" for entry in strengths)
    line += "" if split == "combo" else f" --split {split}"
    line += "" if not sites else f" --sites {','.join(sites)}"
    line += " --adain DIR" if adain else ""
    return f"{line}  # steps={steps}" if steps != 20 else line


def make_stages(methods: Sequence[Method], vgg: AdaIN | None) -> dict[str, Stage]:
    """Every model that the methods name, and the embedded one, whose CLIP measures."""
    from condit.pipeline import load

    found = {}
    for model in {"tiny", *(method.model for method in methods)}:
        pipe = load(model)
        adapters = sets.load_adapters((m.needs for m in methods if m.needs and m.model == model), pipe)
        found[model] = Stage(pipe, adapters, adain=vgg)
    return found


def runnable(study: Study, methods: Sequence[Method], asked: Collection[str]) -> list[Method]:
    """Those that can run here; the others are noted, or refused (ValueError) where they were asked for by name."""
    found = []
    for method in methods:
        why = method.missing(study.stages[method.model])
        if why is None:
            found.append(method)
        elif method.name in asked:
            raise ValueError(f"{method.name}: {why}")
        else:
            study.skipped.append({"method": method.name, "why": why})
            study.tell(f"{method.name}: left out, {why}")
    names = {method.name for method in found}
    return [replace(m, baseline=m.baseline if m.baseline in names else None) for m in found]


def make_pictures(study: Study, method: Method, strength: float) -> Tensor:
    """The method's pictures of all cells at a strength, (N, 3, H, W) uint8, drawn or edited."""
    if method.edit is not None:
        references = reference_icons(study.world, study.cells, method.shows)
        blank = study.images[method.blank, tables.BLANK_STRENGTH]
        true = true_icons(study.world, study.cells)
        return method.edit(study.stages[method.model], blank, references, true, strength)
    return draw(study, method, strength, study.cells, f"{method.name}-{strength:g}")


def draw(study: Study, method: Method, strength: float, cells: Sequence[Cell], name: str) -> Tensor:
    """Picture i starts from the noise of seed + i under every method, so methods differ by their controls alone."""
    stage = study.stages[method.model]
    pipe, make = stage.pipe, method.make
    assert make is not None
    adapter = getattr(stage.adapters.get(method.needs or ""), "hash", "")
    setting = [method.name, method.prompt, method.shows, strength, stage.sites if method.name == "block" else ()]
    names = sets.cell_names(study.world, cells)
    mark = sets.mark_of([pipe.parts.hash, str(pipe.dtype), adapter, setting, names, study.seed, study.steps])

    def part(start: int) -> list:
        given: Shown = look(study.world, cells[start : start + sets.BATCH], method.shows)
        return pipe(
            method.prompts(given.wanted),
            controls=make(stage, given, strength),
            seed=study.seed + start,
            num_inference_steps=study.steps,
        ).images

    images, seconds = sets.draw_kept(study.folder / f"{name}.safetensors", mark, len(cells), part, tell=study.tell)
    study.seconds[name] = round(seconds, 1)
    return images


def probe_blocks(
    study: Study, ruler: tables.Ruler, cells: Sequence[Cell], size: int = BLOCK
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The measuring side of InstantStyle's block probe: the adapter's attention at one layer at a time, on pairs that
    the evaluation doesn't ask for. Returns the first `size` layers and every layer, ranked by `rank_blocks`."""
    blank = next(method for method in METHODS if method.name == "none")
    given = make_given(replace(study, cells=cells), ruler, "style")
    before = tables.values(ruler, draw(study, blank, tables.BLANK_STRENGTH, cells, "probe-none"), given)
    found = []
    for site in (site.path for site in study.stages["tiny"].pipe.backbone.sites):
        method = Method(f"probe/{site}", site, partial(at_sites, sites=(site,)), needs="tiny/style")
        after = tables.values(ruler, draw(study, method, 1.0, cells, f"probe-{site}"), given)
        style, leakage = (float((after[m] - before[m]).mean()) for m in (tables.SCORE, tables.LEAKAGE))
        found.append({"site": site, "style": round(style, 4), "leakage": round(leakage, 4), "n": len(cells)})
    ranked = rank_blocks(found)
    return tuple(entry["site"] for entry in ranked[:size]), ranked


def rank_blocks(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers with at least half of the style that the best layer wins, least leakage first; then the others by style. A
    layer that does nothing leaks nothing, so leakage alone would choose it."""
    most = max(entry["style"] for entry in found)
    strong = [dict(entry) for entry in found if entry["style"] >= most / 2 > 0]
    weak = [dict(entry) for entry in found if dict(entry) not in strong]
    return sorted(strong, key=lambda x: x["leakage"]) + sorted(weak, key=lambda x: -x["style"])


def make_given(study: Study, ruler: tables.Ruler, shows: Literal["style", "subject"]) -> tables.Given:
    given = look(study.world, study.cells, shows)
    references = reference_icons(study.world, study.cells, shows)
    true = true_icons(study.world, study.cells)
    return tables.Given(given.wanted, given.icons, references, true, ruler.style(references))


def measure(
    study: Study, ruler: tables.Ruler, methods: Sequence[Method], given: Mapping[str, tables.Given]
) -> dict[Key, dict[str, Tensor]]:
    """Every measure of every method at every strength, increases over the method's own blank."""
    raw = {
        (key, shows): tables.values(ruler, images, against)
        for key, images in study.images.items()
        for shows, against in given.items()
        if any(m.name == key[0] and (m.shows == shows or m.name in {x.blank for x in methods}) for m in methods)
    }
    found = {}
    for method in methods:
        blank = raw[(method.blank, tables.BLANK_STRENGTH), method.shows]
        for strength in method.strengths:
            found[method.name, strength] = tables.less_blank(raw[(method.name, strength), method.shows], blank)
    return found


def write_table(result: Mapping[str, Any], path: str | Path) -> Path:
    """The figures as Markdown between the lines `<!-- style-evaluation -->` and `<!-- /style-evaluation -->` of `path`,
    or as a new file."""
    from condit.evaluation.tiny import write_between

    return write_between(path, tables.markdown(result), "style-evaluation")
