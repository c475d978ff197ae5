"""The evaluation of style transfer: every method as a curve over its strength, against the plain adapter's curve.

Protocol, figures and limits: docs/papers/style-evaluation.md.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.data.files import atomic_write
from condit.weights.catalog import MODELS
from condit_lab.icons.world import IconWorld
from condit_lab.suites import sets
from condit_lab.suites import style_rows as tables
from condit_lab.suites import style_rulers as rulers
from condit_lab.suites.adain import AdaIN
from condit_lab.suites.sets import Cell, choose_cells
from condit_lab.suites.style_measures import retrieval_chance
from condit_lab.suites.style_methods import (
    METHODS,
    CellInputs,
    Method,
    Stage,
    at_sites,
    choose,
    look,
    reference_icons,
    style_block,
    to_image,
    true_icons,
    with_strengths,
)
from condit_lab.suites.style_report import write_page
from condit_lab.suites.tiny import open_world, write_between

log = logging.getLogger(__name__)

QUICK, PROBE, BLOCK = 16, 16, 2  # pictures of a quick run and of the block probe; layers of a style block
Key = tuple[str, float]
Pairs = Callable[[IconWorld, "Protocol"], tuple[IconWorld, list[Cell], list[Cell]]]


@dataclass(frozen=True)
class Protocol:
    """What a run was asked for. count: held-out (concept, style) pairs. methods: names of the table, None = all that
    can run. strengths: "0.3,1" for all that have several, "plain=0.3,1" for one. split: held-out combinations, or the
    never-trained style. sites: the layers of the style block, none = the block probe finds them. bf16: draw in
    bfloat16; what measures stays in float32."""

    count: int = 256
    seed: int = 0
    methods: tuple[str, ...] | None = None
    strengths: tuple[str, ...] = ()
    split: Literal["combo", "style"] = "combo"
    sites: tuple[str, ...] = ()
    steps: int = 20
    bf16: bool = False

    def command(self, *, data: bool, adain: bool, verb: str = "evaluate style") -> str:
        """The command line without folders' own names."""
        line = f"condit {verb}{' --data ICONS' if data else ''} --count {self.count} --seed {self.seed}"
        line += "" if self.methods is None else f" --methods {','.join(self.methods)}"
        line += "".join(f" --strengths {entry}" for entry in self.strengths)
        line += "" if self.split == "combo" else f" --split {self.split}"
        line += "" if not self.sites else f" --sites {','.join(self.sites)}"
        line += "" if self.steps == 20 else f" --steps {self.steps}"
        line += " --bf16" if self.bf16 else ""
        return line + (" --adain DIR" if adain else "")


@dataclass
class StyleStudy:
    """One run: the world and its cells, where pictures are kept, the models by name, what was drawn so far."""

    protocol: Protocol
    world: IconWorld
    cells: Sequence[Cell]
    folder: Path
    stages: dict[str, Stage]
    tell: Callable[[str], None]
    images: dict[Key, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """A run: its figures, its pictures, what was measured of each of them against what, and the features (M, 448) of
    real icons."""

    result: dict[str, Any]
    images: Mapping[Key, Tensor]
    values: tables.Table
    given: Mapping[str, rulers.Given]
    bank: Tensor


def evaluate_style(
    out: str | Path,
    protocol: Protocol | None = None,
    *,
    data: str | Path | None = None,
    adain: str | Path | None = None,
    table: Sequence[Method] = METHODS,
    tell: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Measure methods of style transfer as curves over their strength; returns what stands in `out/style.json`. The
    arguments: see `measure_styles`."""
    protocol, folder = protocol or Protocol(), Path(out)
    run = measure_styles(out, protocol, data=data, adain=adain, table=table, tell=tell)
    text = json.dumps(run.result, indent=1, allow_nan=False)
    atomic_write(folder / "style.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_page(folder, run.result, run.images, run.values, run.given)
    tell(f"{folder / 'index.html'}: {run.result['seconds']['all']:.0f} s")
    return run.result


def measure_styles(
    out: str | Path,
    protocol: Protocol,
    *,
    data: str | Path | None = None,
    adain: str | Path | None = None,
    table: Sequence[Method] = METHODS,
    pairs: Pairs | None = None,
    verb: str = "evaluate style",
    tell: Callable[[str], None] = log.info,
) -> Measured:
    """Every method comes with its no control and its baseline. Pictures are kept under `out/images`: a broken run goes
    on.

    data: an icon world, None = the packed sample, which holds few held-out icons. adain: a folder with AdaIN's weights.
    pairs: the world, the cells to measure and others for the block probe; None: `choose_pairs`. verb: of the command
    that the result names. Raises ValueError if a method that was requested by name cannot run."""
    began, folder = time.perf_counter(), Path(out)
    methods = with_strengths(choose(protocol.methods, table), protocol.strengths)
    if protocol.count < 2:
        raise ValueError(
            f"count is the number of images of each method and must be at least 2; found {protocol.count}."
        )
    vgg = AdaIN.load(adain) if adain is not None or "adain" in (protocol.methods or ()) else None
    world = IconWorld.open(open_world(data))
    world, cells, spare = (world, *choose_pairs(world, protocol)) if pairs is None else pairs(world, protocol)
    study = StyleStudy(protocol, world, cells, folder / "images", make_stages(methods, vgg, bf16=protocol.bf16), tell)
    methods = runnable(study, methods)
    ruler = rulers.make_ruler(world, study.stages["tiny"].pipe)
    probe: list[dict[str, Any]] = []
    if any(method.make is style_block for method in methods):
        sites, probe = (protocol.sites, []) if protocol.sites else probe_blocks(study, ruler, spare)
        study.stages["tiny"] = replace(study.stages["tiny"], sites=sites)
    for method in methods:
        for strength in method.strengths:
            study.images[method.name, strength] = make_pictures(study, method, strength)
    tell("measuring")
    kinds: set[Literal["style", "subject"]] = {method.shows for method in methods}
    given = {shows: make_given(study, ruler, shows) for shows in kinds}
    values = measure(study, ruler, methods, given)
    figures = describe(study, methods, values, given["style"].clusters)
    result = {
        "command": protocol.command(data=data is not None, adain=adain is not None, verb=verb),
        **figures,
        "probe": probe,
        "rulers": rulers.check_rulers(ruler, world),
        # Pictures that were kept from an earlier run count with the time that they took then.
        "seconds": {
            **study.seconds,
            "drawing": round(sum(study.seconds.values()), 1),
            "all": round(time.perf_counter() - began, 1),
        },
    }
    return Measured(result, study.images, values, given, ruler.bank)


def describe(
    study: StyleStudy, methods: Sequence[Method], values: tables.Table, clusters: Sequence[str]
) -> dict[str, Any]:
    """The figures with what they are of."""
    shows = {method.name: method.shows for method in methods}
    of_style = {key: value for key, value in values.items() if shows[key[0]] == "style"}
    held = {method.name: (method.baseline, method.blank) for method in methods}
    styles = [study.world.icons[cell.icon].style for cell in study.cells]
    return {
        "hash": study.stages["tiny"].pipe.parts.hash,
        "models": {model: stage.pipe.parts.hash for model, stage in sorted(study.stages.items())},
        "protocol": asdict(study.protocol),
        "n": len(study.cells),
        "concepts": len(set(clusters)),
        "styles": len(set(styles)),
        "methods": [
            {"name": m.name, "what": m.what, "baseline": m.baseline, "blank": m.blank, "model": m.model}
            for m in methods
        ],
        "shows": shows,
        "swept": [m.name for m in methods if len(m.strengths) > 1],
        "measures": [asdict(m) for m in rulers.MEASURES],
        "retrieval_chance": round(retrieval_chance(styles), 4),
        "rows": tables.as_json(tables.rows(values, clusters, shows)),
        "comparisons": tables.as_json(tables.comparisons(of_style, clusters, held)),
        "pairs": tables.as_json(tables.pairs({k: v for k, v in values.items() if shows[k[0]] == "subject"}, clusters)),
        "sites": list(study.stages["tiny"].sites),
        "skipped": study.skipped,
    }


def choose_pairs(world: IconWorld, protocol: Protocol) -> tuple[list[Cell], list[Cell]]:
    """Up to `count` held-out pairs to evaluate and some others for the block probe."""
    spare = min(PROBE, protocol.count)
    cells = choose_cells(world, protocol.split, protocol.count + spare, protocol.seed)
    kept = min(protocol.count, max(len(cells) - spare, len(cells) // 2))
    if kept < 2:
        raise ValueError(
            f"This world has {len(cells)} held-out icons of split {protocol.split!r}. "
            "Build the whole world: condit data icons."
        )
    return cells[:kept], cells[kept:]


def make_stages(methods: Sequence[Method], vgg: AdaIN | None, *, bf16: bool = False) -> dict[str, Stage]:
    """Every model that the methods name, if it is here, and the embedded one, whose CLIP measures."""
    from condit.drawing.loading import load

    stages = {}
    for model in {"tiny", *(method.model for method in methods if method.model in MODELS)}:
        pipe = load(model, dtype=torch.bfloat16 if bf16 else None)
        adapters = sets.load_adapters((m.needs for m in methods if m.needs and m.model == model), pipe)
        stages[model] = Stage(pipe, adapters, adain=vgg)
    return stages


def runnable(study: StyleStudy, methods: Sequence[Method]) -> list[Method]:
    """Those that can run here; the others are noted, or raise ValueError if they were requested by name."""
    supported, requested = [], study.protocol.methods or ()
    for method in methods:
        stage = study.stages.get(method.model)
        why = f"no model {method.model}" if stage is None else method.missing(stage)
        if why is None:
            supported.append(method)
        elif method.name in requested:
            raise ValueError(f"{method.name}: {why}")
        else:
            study.skipped.append({"method": method.name, "why": why})
            study.tell(f"{method.name}: left out, {why}")
    names = {method.name for method in supported}
    return [replace(m, baseline=m.baseline if m.baseline in names else None) for m in supported]


def make_pictures(study: StyleStudy, method: Method, strength: float) -> Tensor:
    """The method's pictures of all cells at a strength, (N, 3, H, W) uint8, drawn or edited."""
    if method.edit is not None:
        references = reference_icons(study.world, study.cells, method.shows)
        blank = study.images[method.blank, tables.BLANK_STRENGTH]
        true = true_icons(study.world, study.cells)
        return method.edit(study.stages[method.model], blank, references, true, strength)
    return draw(study, method, strength, study.cells, f"{method.name}-{strength:g}")


def draw(study: StyleStudy, method: Method, strength: float, cells: Sequence[Cell], name: str) -> Tensor:
    """Picture i starts from the noise of seed + i under every method, so methods differ by their controls alone."""
    stage, seed, steps = study.stages[method.model], study.protocol.seed, study.protocol.steps
    pipe, make = stage.pipe, method.make
    assert make is not None
    adapter = getattr(stage.adapters.get(method.needs or ""), "hash", "")
    setting = [method.name, method.prompt, method.shows, strength, stage.sites if make is style_block else ()]
    names = sets.cell_names(study.world, cells)
    mark = sets.mark_of([sets.drawn_by(pipe), adapter, setting, names, seed, steps])

    def part(start: int) -> list:
        given: CellInputs = look(study.world, cells[start : start + sets.BATCH], method.shows)
        if method.edits:
            blank = study.images[method.blank, tables.BLANK_STRENGTH][start : start + sets.BATCH]
            given = replace(given, blank=[to_image(picture) for picture in blank])
        return pipe(
            method.prompts(given.wanted),
            controls=make(stage, given, strength),
            seed=seed + start,
            num_inference_steps=steps,
        ).images

    images, seconds = sets.draw_kept(study.folder / f"{name}.safetensors", mark, len(cells), part, tell=study.tell)
    study.seconds[name] = round(seconds, 1)
    return images


def probe_blocks(
    study: StyleStudy, ruler: rulers.Ruler, cells: Sequence[Cell], size: int = BLOCK
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The measuring side of InstantStyle's block probe: the adapter's attention at one layer at a time, on pairs that
    the evaluation doesn't ask for. Returns the first `size` layers and every layer, ranked by `rank_blocks`."""
    blank = next(method for method in METHODS if method.name == "none")
    given = make_given(replace(study, cells=cells), ruler, "style")
    before = rulers.values(ruler, draw(study, blank, tables.BLANK_STRENGTH, cells, "probe-none"), given)
    layers = []
    for site in (site.path for site in study.stages["tiny"].pipe.backbone.sites):
        method = Method(f"probe/{site}", site, partial(at_sites, sites=(site,)), needs="tiny/style")
        after = rulers.values(ruler, draw(study, method, 1.0, cells, f"probe-{site}"), given)
        style, leakage = (float((after[m] - before[m]).mean()) for m in (rulers.SCORE, rulers.LEAKAGE))
        layers.append({"site": site, "style": round(style, 4), "leakage": round(leakage, 4), "n": len(cells)})
    ranked = rank_blocks(layers)
    return tuple(entry["site"] for entry in ranked[:size]), ranked


def rank_blocks(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers with at least half of the style that the best layer wins, least leakage first; then the others by style. A
    layer that does nothing leaks nothing, so leakage alone would choose it."""
    most = max(entry["style"] for entry in layers)
    strong = [dict(entry) for entry in layers if entry["style"] >= most / 2 > 0]
    weak = [dict(entry) for entry in layers if dict(entry) not in strong]
    return sorted(strong, key=lambda x: x["leakage"]) + sorted(weak, key=lambda x: -x["style"])


def make_given(study: StyleStudy, ruler: rulers.Ruler, shows: Literal["style", "subject"]) -> rulers.Given:
    given = look(study.world, study.cells, shows)
    references = reference_icons(study.world, study.cells, shows)
    true = true_icons(study.world, study.cells)
    return rulers.Given(given.wanted, given.icons, references, true, F.normalize(ruler.drawn(references)[0], dim=-1))


def measure(
    study: StyleStudy, ruler: rulers.Ruler, methods: Sequence[Method], given: Mapping[str, rulers.Given]
) -> dict[Key, dict[str, Tensor]]:
    """Every measure of every method at every strength, increases over the method's own blank."""
    blanks = {
        (method.blank, method.shows): rulers.values(
            ruler, study.images[method.blank, tables.BLANK_STRENGTH], given[method.shows]
        )
        for method in methods
    }
    measured = {}
    for method in methods:
        for strength in method.strengths:
            own = rulers.values(ruler, study.images[method.name, strength], given[method.shows])
            measured[method.name, strength] = tables.less_blank(own, blanks[method.blank, method.shows])
    return measured


def write_table(result: Mapping[str, Any], path: str | Path) -> Path:
    """The figures as Markdown between the lines `<!-- style-evaluation -->` and `<!-- /style-evaluation -->` of `path`,
    or as a new file."""
    return write_between(path, tables.markdown(result), "style-evaluation")
