"""The suite's tables: each measure over the sets of a split, beside its ceiling and its baselines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condit.data import annotators
from condit.data.line_score import edge_f1
from condit.rulers import pixels, statistics
from condit_lab.icons.world import Icon, IconWorld
from condit_lab.suites import measures
from condit_lab.suites.sets import Cell, Spec, Split

STYLE, TOP1, TOP5, LEAKAGE = "style agreement", "concept top-1", "concept top-5", "leakage"
SIMILARITY, DUPLICATES, F1 = "edge similarity to the true icon", "near-duplicates of training icons", "edge F1"
PSNR, COLOUR = "luma PSNR to the gray picture, dB", "colour distance to the true icon"
SUBJECT_EDGES, SUBJECT_COLOUR = (
    "edge similarity to the subject's reference",
    "colour distance to the subject's reference",
)
REAL, COPY, OTHER = "real icons", "copying the reference", "real icons of the concept by another vendor"
LATENT = "real icons through the latent"
WORDS_ALONE = "no control (style word alone)"  # beside edges and gray, whose prompts have the style word
SPLITS: dict[str, str] = {
    "combo": "held-out combinations",
    "concept": "held-out concepts",
    "style": "never-trained style",
}
_PSEUDO = {"copy": COPY, "other": OTHER, "latent": LATENT, "real": REAL}
_COLOURED = 10.0  # mean chroma in CIELAB; black and white sets stay below 2


@dataclass(frozen=True)
class FigureRow:
    """One figure: the mean over n pictures and its 95 % interval; of_ceiling = [value, low, high] over real icons'."""

    measure: str
    split: str
    case: str
    value: float
    low: float
    high: float
    n: int
    of_ceiling: list[float] | None = None


@dataclass
class Scene:
    """A split's cells, their icons, the pictures of each set (N, 3, 128, 128) uint8; of each picture the judge's
    probabilities (N, S) and the concept's embedding (N, 192). Beside the drawn sets (`specs`) stand "real", "copy" (the
    style reference), "other" (the concept by another vendor) and "latent" (real, encoded and decoded)."""

    split: Split
    cells: Sequence[Cell]
    icons: Sequence[Icon]
    specs: dict[str, Spec] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    styles: dict[str, Tensor] = field(default_factory=dict)
    concepts: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)  # (N,): what sorts the sheets

    def case(self, name: str) -> str:
        return self.specs[name].what if name in self.specs else _PSEUDO[name]

    def names(self, *pseudo: str) -> list[str]:
        """The drawn sets, and those of `pseudo` that the split has."""
        return [*self.specs, *(name for name in pseudo if name in self.images)]

    @property
    def clusters(self) -> list[str]:
        """Pictures of one concept are not independent."""
        return [icon.base for icon in self.icons]

    def row(
        self, measure: str, case: str, values: Tensor, *, ceiling: Tensor | None = None, kept: Tensor | None = None
    ) -> FigureRow:
        """kept: (N,) bool, the pictures for which the measure has a meaning."""
        chosen = torch.ones(len(self.icons), dtype=torch.bool) if kept is None else kept
        clusters = [name for name, keep in zip(self.clusters, chosen.tolist(), strict=True) if keep]
        interval = statistics.bootstrap(values[chosen], clusters)
        part = None if ceiling is None else statistics.ratio(values[chosen], ceiling[chosen], clusters)
        share = None if part is None else [round(x, 4) for x in (part.value, part.low, part.high)]
        value, low, high = (round(x, 4) for x in (interval.value, interval.low, interval.high))
        return FigureRow(measure, self.split, case, value, low, high, interval.n, share)


def style_numbers(scene: Scene, styles: Sequence[str]) -> Tensor:
    return torch.tensor([styles.index(icon.style) for icon in scene.icons])


def style_rows(scene: Scene, styles: Sequence[str]) -> list[FigureRow]:
    """Share of pictures that the judge takes for the target's style; the ceiling is that of the cells' real icons."""
    wanted = style_numbers(scene, styles)
    ceiling = measures.agreement(scene.styles["real"], wanted)
    return [
        scene.row(STYLE, scene.case(name), measures.agreement(scene.styles[name], wanted), ceiling=ceiling)
        for name in scene.names("copy", "latent", "real")
    ]


def ranks(scene: Scene, name: str, labels: Sequence[str], texts: Tensor) -> Tensor:
    truth = torch.tensor([labels.index(icon.label) for icon in scene.icons])
    return measures.concept_ranks(scene.concepts[name], texts, truth)


def sheet_scores(scene: Scene, name: str, styles: Sequence[str], labels: Sequence[str], texts: Tensor) -> Tensor:
    """The judge's probability of the wanted style over the rank of the concept (1 = first), (N,)."""
    own = scene.styles[name].gather(1, style_numbers(scene, styles)[:, None])[:, 0]
    return own / (1 + ranks(scene, name, labels, texts))


def retrieval_rows(scene: Scene, labels: Sequence[str], texts: Tensor) -> list[FigureRow]:
    """Share of pictures whose concept our CLIP ranks first, or among five, of all labels. "other" is the subject
    reference itself."""
    ranks_by_name = {name: ranks(scene, name, labels, texts) for name in scene.names("copy", "other", "latent", "real")}
    return [
        scene.row(measure, scene.case(name), rank < most, ceiling=ranks_by_name["real"] < most)
        for measure, most in ((TOP1, 1), (TOP5, 5))
        for name, rank in ranks_by_name.items()
    ]


def leakage_rows(scene: Scene, icons: Sequence[Icon], labels: Sequence[str], texts: Tensor) -> list[FigureRow]:
    """Share of pictures nearer to a reference's own concept than to the prompted one; without a control and on real
    icons the same pairs are asked, which gives the chance level."""
    number = {label: i for i, label in enumerate(labels)}
    prompted = torch.tensor([number[icon.label] for icon in scene.icons])

    def references(kind: str | None) -> Tensor:
        given = {"three": [c.style for c in scene.cells], "unseen": [(c.unseen,) for c in scene.cells]}
        chosen = given.get(kind or "", [c.style[:1] for c in scene.cells])
        return torch.tensor([[number[icons[j].label] for j in group] for group in chosen])

    kinds = {
        name: spec.reference for name, spec in scene.specs.items() if spec.reference in ("style", "three", "unseen")
    }
    if not kinds:
        return []
    baselines = {name: "style" for name in ("none", "new-none", "copy", "real") if name in scene.images}
    return [
        scene.row(LEAKAGE, scene.case(name), measures.leaks(scene.concepts[name], texts, prompted, references(kind)))
        for name, kind in {**kinds, **baselines}.items()
    ]


def edge_similarity_rows(scene: Scene) -> list[FigureRow]:
    """Correlation of soft edges with the true icon that the model has not seen."""
    real = scene.images["real"]
    return [
        scene.row(SIMILARITY, scene.case(name), _by_parts(pixels.edge_similarity, scene.images[name], real))
        for name in scene.names("copy", "other", "latent")
    ]


def _by_parts(function: Any, *images: Tensor) -> Tensor:
    """In parts, because fp32 maps of 512 pictures fill a laptop."""
    return torch.cat([function(*part) for part in zip(*(x.split(64) for x in images), strict=True)])


def near_duplicate_threshold(yardstick: Tensor, bank: Tensor) -> float:
    """The distance that 1 % of the real icons of held-out concepts have to their nearest training icon."""
    return float(measures.nearest(yardstick, bank)[0].quantile(0.01))


def near_duplicate_rows(scene: Scene, bank: Tensor, threshold: float) -> list[FigureRow]:
    """Share of pictures whose nearest training icon (32 px, colours only) is closer than the threshold."""
    return [
        scene.row(DUPLICATES, scene.case(name), measures.nearest(measures.thumbnails(images), bank)[0] < threshold)
        for name in scene.names("real")
        for images in (scene.images[name],)
    ]


def edge_f1_rows(scene: Scene, world: IconWorld) -> list[FigureRow]:
    """Edges of the drawn picture against the map that it was given, beside the same prompts and noise without a map,
    and the true icon on white (a map made from alpha has lines that white paper hides)."""
    if "edges" not in scene.specs:
        return []
    scores = edge_scores(scene, world)
    cases = {name: WORDS_ALONE if name == "words" else scene.case(name) for name in scores}
    return [scene.row(F1, cases[name], values, ceiling=scores["real"]) for name, values in scores.items()]


def edge_scores(scene: Scene, world: IconWorld) -> dict[str, Tensor]:
    """F1 of every picture, (N,), by set."""
    given = torch.stack([_lines(world.rgba(cell.icon)) for cell in scene.cells])
    scores = {}
    for name in ("edges", "words", "real"):
        if name in scene.images:
            lines = torch.stack([_lines(x.permute(1, 2, 0).numpy()) for x in scene.images[name]])
            scores[name] = edge_f1(lines, given)
    return scores


def _lines(pixels: np.ndarray) -> Tensor:
    # An icon without transparent pixels is read as RGB by the annotator too.
    opaque = pixels.shape[2] == 4 and pixels[..., 3].min() == 255
    return torch.from_numpy(annotators.edges_array(pixels[..., :3] if opaque else pixels) > 0)


def gray_rows(scene: Scene) -> list[FigureRow]:
    """How well the given lightness is kept, and how near the colours come to the true ones. Colours are asked of
    coloured icons only: a black and white set has none to find."""
    if "gray" not in scene.specs:
        return []
    real = scene.images["real"]
    gray = _gray(real)
    coloured = _by_parts(measures.colour_distance, gray, real) > _COLOURED
    compared = {scene.case("gray"): scene.images["gray"]}
    if "words" in scene.images:
        compared[WORDS_ALONE] = scene.images["words"]
    rows = [scene.row(PSNR, case, measures.luma_psnr(images, gray)) for case, images in compared.items()]
    if not coloured.any():
        return rows
    compared["the gray picture itself"] = gray
    for case, images in compared.items():
        distance = _by_parts(measures.colour_distance, images, real)
        rows.append(scene.row(COLOUR, case, distance, kept=coloured))
    return rows


def subject_rows(scene: Scene) -> list[FigureRow]:
    """How near pictures come to the reference that shows their subject; the true icon is another hand's drawing of it.
    Colours are asked where both of these have some."""
    if "subject" not in scene.specs:
        return []
    shown, real = scene.images["other"], scene.images["real"]
    compared = {scene.case("subject"): scene.images["subject"]}
    if "words" in scene.images:
        compared[WORDS_ALONE] = scene.images["words"]
    compared[REAL] = real
    rows = [scene.row(SUBJECT_EDGES, c, _by_parts(pixels.edge_similarity, x, shown)) for c, x in compared.items()]
    coloured = torch.stack([_by_parts(measures.colour_distance, _gray(x), x) > _COLOURED for x in (shown, real)]).all(0)
    if coloured.any():
        for case, images in compared.items():
            distance = _by_parts(measures.colour_distance, images, shown)
            rows.append(scene.row(SUBJECT_COLOUR, case, distance, kept=coloured))
    return rows


def _gray(images: Tensor) -> Tensor:
    """The same without colours, (N, 3, H, W) uint8."""
    levels = (pixels.luma(images) * 255).round().to(torch.uint8)
    return levels[:, None].expand(-1, 3, -1, -1)


def criteria(rows: Collection[FigureRow]) -> list[dict[str, Any]]:
    """What the model was asked for, with what it has: only those whose sets were drawn."""
    table = {(row.measure, row.split, row.case): row for row in rows}
    outcomes: list[dict[str, Any]] = []

    def ask(text: str, value: float | None, wanted: float, at_least: bool = True) -> None:
        if value is not None:
            holds = value >= wanted if at_least else value <= wanted
            outcomes.append({"text": text, "value": round(value, 4), "wanted": round(wanted, 4), "holds": holds})

    def share(measure: str, case: str, split: str = "combo") -> float | None:
        row = table.get((measure, split, case))
        return row.of_ceiling[0] if row and row.of_ceiling else None

    def value(measure: str, case: str, split: str = "combo") -> float | None:
        row = table.get((measure, split, case))
        return row.value if row else None

    ask("style word, share of the ceiling", share(STYLE, "style word"), 0.85)
    ask("style reference, share of the ceiling", share(STYLE, "style reference"), 0.75)
    plain = value(STYLE, "no control")
    if plain is not None:
        ask("style reference, at least 3 times no control", value(STYLE, "style reference"), 3 * plain)
    ask("never-trained style by reference", value(STYLE, "style reference", "style"), 0.30)
    for case in ("style word", "style reference"):
        ask(f"concept top-5, {case}, share of the ceiling", share(TOP5, case), 0.60)
    ask("leakage of the style reference, at most", value(LEAKAGE, "style reference"), 0.10, at_least=False)
    others, real = value(SIMILARITY, OTHER), value(DUPLICATES, REAL)
    for case in ("style word", "style reference"):
        if others is not None:
            ask(f"edge similarity, {case}, above other vendors' icons", value(SIMILARITY, case), others)
        if real is not None:
            ask(f"near-duplicates, {case}, no more than real icons", value(DUPLICATES, case), real, at_least=False)
    plain = value(F1, WORDS_ALONE)
    if plain is not None:
        ask("edge F1, at least twice no control", value(F1, "style word and edges"), 2 * plain)
    return outcomes


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as Markdown tables, one a measure and split, with the command that made them."""
    lines = [f"`{result['command']}`, {result['seconds']['all']:.0f} s; model {result['hash']}.", ""]
    if result["criteria"]:
        lines += ["| criterion | required | measured | |", "|---|---|---|---|"]
        for entry in result["criteria"]:
            state = "holds" if entry["holds"] else "**missed**"
            lines.append(f"| {entry['text']} | {entry['wanted']:.3f} | {entry['value']:.3f} | {state} |")
        lines.append("")
    for measure, split, group in by_table(result["rows"]):
        has_share = any(row["of_ceiling"] for row in group)
        lines.append(f"**{measure}, {SPLITS[split]}** (n = {max(row['n'] for row in group)})")
        lines += [
            "",
            f"| | value | 95 % |{' of real icons |' if has_share else ''}",
            f"|---|---|---|{'---|' if has_share else ''}",
        ]
        for row in group:
            part = row["of_ceiling"]
            last = f" {f'{part[0]:.2f} ({part[1]:.2f} to {part[2]:.2f})' if part else ''} |" if has_share else ""
            lines.append(f"| {row['case']} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} |{last}")
        lines.append("")
    lines += [f"Left out: {entry['set']} ({entry['why']})." for entry in result["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def by_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Rows grouped by measure and split, measures in the order of their first row."""
    keys = sorted(
        {(row["measure"], row["split"]) for row in rows},
        key=lambda key: ([row["measure"] for row in rows].index(key[0]), list(SPLITS).index(key[1])),
    )
    return [(m, s, [row for row in rows if (row["measure"], row["split"]) == (m, s)]) for m, s in keys]
