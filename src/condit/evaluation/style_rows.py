"""The figures of the style evaluation: what is measured of each picture, the comparison with the baseline's curve, and
whether the rulers themselves tell style from content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from condit.data.icon_styles import style_of
from condit.data.icons import GROUPS, TRAIN_LICENCES, Icon, IconWorld, family, unit
from condit.encoders.clip import CONCEPT, STYLE, embed_image, embed_text, token_ids
from condit.evaluation import measures
from condit.evaluation import style_measures as own
from condit.evaluation.judge import Judge, is_for_judge
from condit.evaluation.sets import pictures
from condit.evaluation.tiny import make_bench

BANK, RULER_ICONS = 2000, 400
SCORE, ACCURACY, RETRIEVAL, WORDS = "style score", "style accuracy", "style retrieval", "style words (SS)"
LEAKAGE, LEAKS, LIKENESS = "leakage, increase", "leaks, increase", "likeness to the reference, increase"
ALIGNMENT, TOP5, SUBJECT, REALISTIC = "text alignment (TA)", "concept top-5", "subject fidelity", "realistic"


@dataclass(frozen=True)
class Measure:
    """more: whether more of it is better (None: neither). increase: what the same noise has without a reference is
    taken off. of_style: has a meaning only where a style is shown. compared: at the baseline's equal style."""

    name: str
    what: str
    more: bool | None
    increase: bool = False
    of_style: bool = False
    compared: bool = False


MEASURES: tuple[Measure, ...] = (
    Measure(SCORE, "the judge's probability of the wanted style; the axis of every comparison", True),
    Measure(ACCURACY, "share that the judge takes for the wanted style", True),
    Measure(
        RETRIEVAL, "share nearer to its own reference than to every reference of another style", True, of_style=True
    ),
    Measure(WORDS, "cosine of the picture with the style's words, in CLIP's style half (DEADiff's SS)", True),
    Measure(
        LEAKAGE,
        "cosine with the label of the reference's concept, above the same noise without a reference",
        False,
        increase=True,
        of_style=True,
        compared=True,
    ),
    Measure(
        LEAKS,
        "share nearer to the reference's concept than to the prompt, above no reference",
        False,
        increase=True,
        of_style=True,
    ),
    Measure(
        LIKENESS,
        "correlation of soft edges with the shown picture, above no reference; no CLIP in it",
        None,
        increase=True,
        compared=True,
    ),
    Measure(
        ALIGNMENT, "cosine of the picture with its prompt, in CLIP's concept half (DEADiff's TA)", True, compared=True
    ),
    Measure(TOP5, "share whose prompted concept is among the five nearest of all labels", True),
    Measure(SUBJECT, "correlation of soft edges with the true icon, which no model saw", True, compared=True),
    Measure(REALISTIC, "share in the manifold of real icons, by the judge's features (precision)", True, compared=True),
)


@dataclass(frozen=True)
class Ruler:
    """What measures: the judge and the styles among which it chooses; a CLIP; real icons of the training split as
    judge features (M, 448) scaled to unit length, with each one's reach; every label's embedding (C, 192)."""

    judge: Judge
    among: list[str]
    pipe: Any
    labels: list[str]
    texts: Tensor
    scale: own.Scale
    bank: Tensor
    reaches: Tensor

    @torch.no_grad()
    def clip(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) uint8 -> embeddings (N, 256)."""
        parts = [embed_image(self.pipe.image.clip, x.float() / 127.5 - 1)[1] for x in images.split(64)]
        return torch.cat(parts).float()

    @torch.no_grad()
    def words(self, texts: Sequence[str]) -> Tensor:
        """Texts -> embeddings (N, 256)."""
        ids = token_ids(self.pipe.parts.text.tokenizer, list(texts))
        return torch.cat([embed_text(self.pipe.image.clip, x)[1] for x in ids.split(256)]).float()

    def style(self, images: Tensor) -> Tensor:
        """Pictures -> unit features of how they are drawn (N, 448); independent of the CLIP."""
        return self.scale(self.judge.features(images))


def make_ruler(world: IconWorld, pipe: Any, judge: Judge | None = None) -> Ruler:
    """pipe: whose CLIP measures concepts (the embedded model's)."""
    bench = make_bench(world, pipe, judge)
    trained = [i for i, icon in enumerate(world.icons) if icon.split == "train" and usable(icon)]
    trained.sort(key=lambda i: unit(f"bank/{world.icons[i].style}/{world.icons[i].hex}"))
    features = bench.judge.features(pictures(world, trained[:BANK]))
    scale = own.Scale.of(features)
    bank = scale(features)
    return Ruler(bench.judge, bench.among, pipe, bench.labels, bench.texts, scale, bank, own.reach(bank))


def usable(icon: Icon) -> bool:
    return icon.group in GROUPS and icon.licence in TRAIN_LICENCES


@dataclass(frozen=True)
class Given:
    """What the pictures of a method are measured against: wanted icons, references' icons, references and true icons as
    pictures (N, 3, H, W) uint8, and the references' unit features."""

    wanted: Sequence[Icon]
    icons: Sequence[Icon]
    references: Tensor
    true: Tensor
    features: Tensor

    @property
    def clusters(self) -> list[str]:
        return [icon.base for icon in self.wanted]


def values(ruler: Ruler, images: Tensor, given: Given) -> dict[str, Tensor]:
    """Every measure of every picture, (N,) each; increases still without their blank taken off."""
    styles = [icon.style for icon in given.wanted]
    said = ruler.judge.probabilities(images, ruler.among)
    number = torch.tensor([ruler.judge.styles.index(style) for style in styles])
    embedded = ruler.clip(images)
    concept = embedded[:, CONCEPT]
    prompted = torch.tensor([ruler.labels.index(icon.label) for icon in given.wanted])
    shown = torch.tensor([ruler.labels.index(icon.label) for icon in given.icons])
    features = ruler.style(images)
    style_words = ruler.words([f"{style_of(style).name_en} style" for style in styles])
    found = {
        SCORE: said.gather(1, number[:, None])[:, 0],
        ACCURACY: measures.agreement(said, number),
        WORDS: own.cosines(embedded[:, STYLE], style_words[:, STYLE]),
        LEAKAGE: own.cosines(concept, ruler.texts[shown]),
        LEAKS: measures.leaks(concept, ruler.texts, prompted, shown[:, None]),
        LIKENESS: similarity(images, given.references),
        ALIGNMENT: own.cosines(concept, ruler.texts[prompted]),
        TOP5: measures.concept_ranks(concept, ruler.texts, prompted) < 5,
        SUBJECT: similarity(images, given.true),
        REALISTIC: own.realistic(features, ruler.bank, ruler.reaches),
    }
    if len(set(styles)) > 1:  # with one style, its own reference is the only one
        found[RETRIEVAL] = own.retrieved(features, given.features, styles)
    return {name: value.double() for name, value in found.items()}


def similarity(images: Tensor, others: Tensor) -> Tensor:
    """In parts, because fp32 maps of hundreds of pictures fill a laptop."""
    parts = zip(images.split(64), others.split(64), strict=True)
    return torch.cat([measures.edge_similarity(a, b) for a, b in parts])


@dataclass(frozen=True)
class Row:
    """One figure of a method at a strength: the mean and its 95 % interval over n pictures."""

    method: str
    strength: float
    measure: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """A method at a strength against its baseline's curve at the same style (`style_measures.Gap`)."""

    method: str
    strength: float
    baseline: str
    measure: str
    verdict: str
    gap: own.Gap


Table = Mapping[tuple[str, float], Mapping[str, Tensor]]  # (method, strength) -> measure -> (N,)


def less_blank(found: Mapping[str, Tensor], blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Increases: what the same noise and prompt have without a reference taken off."""
    taken = {m.name for m in MEASURES if m.increase}
    return {name: value - blank[name] if name in taken else value for name, value in found.items()}


def rows(table: Table, clusters: Sequence[str], shows: Mapping[str, str]) -> list[Row]:
    """shows: method -> "style" or "subject"; a subject's reference has no style to be found and no concept to leak."""
    found = []
    for (method, strength), values_of in table.items():
        for measure in MEASURES:
            if measure.name not in values_of or (measure.of_style and shows[method] != "style"):
                continue
            mean = measures.bootstrap(values_of[measure.name], clusters)
            value, low, high = (round(x, 4) for x in (mean.value, mean.low, mean.high))
            found.append(Row(method, strength, measure.name, value, low, high, mean.n))
    return found


def comparisons(
    table: Table, clusters: Sequence[str], baselines: Mapping[str, str | None], blanks: Mapping[str, str]
) -> list[Comparison]:
    """Every point of every method with a baseline, against that baseline's curve. The curve starts at no control, which
    is the adapter at strength 0. A baseline's own points are not compared."""
    found = []
    for (method, strength), values_of in table.items():
        baseline = baselines[method]
        if baseline is None or method in (baseline, blanks[method]):
            continue
        points = sorted(s for m, s in table if m == baseline)
        curve = [table[key] for key in [(blanks[method], BLANK_STRENGTH), *((baseline, s) for s in points)]]
        for measure in (m for m in MEASURES if m.compared):
            styles = [point[SCORE] for point in curve]
            held = [point[measure.name] for point in curve]
            gap = own.against_curve(styles, held, values_of[SCORE], values_of[measure.name], clusters)
            # Likeness to the reference has no good side of its own; less of it at equal style is less copying.
            verdict = gap.verdict(bool(measure.more))
            found.append(Comparison(method, strength, baseline, measure.name, verdict, gap))
    return found


BLANK_STRENGTH = 1.0  # methods without a strength stand at 1


def check_rulers(ruler: Ruler, world: IconWorld) -> list[dict[str, Any]]:
    """Does each feature tell what it should, and is it blind to the rest? On real icons that the judge hasn't learned
    from: area under the ROC for pairs of one style (other concepts) against pairs of two styles, and for pairs of one
    concept (by other vendors) against pairs of two concepts. 0.5 is blind."""
    chosen = [i for i, icon in enumerate(world.icons) if icon.split == "concept" and usable(icon)]
    chosen.sort(key=lambda i: unit(f"ruler/{world.icons[i].style}/{world.icons[i].hex}"))
    chosen = [i for i in chosen if not is_for_judge(world.icons[i])][:RULER_ICONS]
    icons = [world.icons[i] for i in chosen]
    if len(icons) < 8:
        return []
    images = pictures(world, chosen)
    clip = ruler.clip(images)
    features = {
        "judge's features": ruler.style(images),
        "CLIP's style half": clip[:, STYLE],
        "CLIP's concept half": clip[:, CONCEPT],
    }
    upper = torch.ones(len(icons), len(icons), dtype=torch.bool).triu(1)
    style = torch.tensor([[a.style == b.style for b in icons] for a in icons])
    vendor = torch.tensor([[family(a.style) == family(b.style) for b in icons] for a in icons])
    concept = torch.tensor([[a.base == b.base for b in icons] for a in icons])
    pairs = {
        "style": (style & ~concept & upper, ~style & ~concept & upper),
        "concept": (concept & ~vendor & upper, ~concept & ~vendor & upper),
    }
    found = []
    for name, feature in features.items():
        scores = feature @ feature.T
        figures = {what: (scores[a], scores[b]) for what, (a, b) in pairs.items() if a.any() and b.any()}
        found.append(
            {"ruler": name, "icons": len(icons), **{k: round(own.auc(a, b), 4) for k, (a, b) in figures.items()}}
        )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as Markdown: every method, then each against the baseline's curve, then the rulers."""
    names = {entry["name"]: entry["what"] for entry in result["methods"]}
    lines = [
        f"`{result['command']}`: n = {result['n']} pictures of {result['concepts']} concepts, "
        f"{result['seconds']['all']:.0f} s; model {result['hash']}. In brackets: 95 %, bootstrap over concepts.",
        "",
        *_methods_table(result, names),
        "",
        f"Chance of style retrieval: {result['retrieval_chance']:.3f}.",
        "",
        "Against the baseline's curve at the same style score: difference (95 %). *even*: the interval covers 0.",
        "",
        *_comparison_table(result, names),
    ]
    if result["probe"]:
        lines += ["", f"Block probe, {result['probe'][0]['n']} other pictures, attention at one layer, strength 1:", ""]
        lines += ["| layer | style score, increase | leakage, increase |", "|---|---|---|"]
        lines += [f"| `{x['site']}` | {x['style']:+.3f} | {x['leakage']:+.3f} |" for x in result["probe"]]
        lines += ["", f"Style block: {', '.join(f'`{site}`' for site in result['sites'])}."]
    if result["rulers"]:
        lines += ["", f"Rulers, on {result['rulers'][0]['icons']} real icons (area under the ROC; 0.5 = blind):", ""]
        lines += ["| ruler | same style | same concept |", "|---|---|---|"]
        lines += [
            f"| {x['ruler']} | {_figure(x.get('style'))} | {_figure(x.get('concept'))} |" for x in result["rulers"]
        ]
    lines += ["", *(f"Left out: {x['method']} ({x['why']})." for x in result["skipped"])]
    return "\n".join(lines).rstrip() + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _methods_table(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    shown = [m.name for m in MEASURES if any(row["measure"] == m.name for row in result["rows"])]
    lines = [f"| method | strength | {' | '.join(shown)} |", f"|---|---|{'---|' * len(shown)}"]
    for method, strength in dict.fromkeys((row["method"], row["strength"]) for row in result["rows"]):
        found = {r["measure"]: r for r in result["rows"] if (r["method"], r["strength"]) == (method, strength)}
        cells = [f"{r['value']:.3f} ({r['low']:.2f} to {r['high']:.2f})" if (r := found.get(m)) else "" for m in shown]
        at = f"{strength:g}" if method in result["swept"] else ""
        lines.append(f"| {names[method]} | {at} | {' | '.join(cells)} |")
    return lines


def _comparison_table(result: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    shown = [m.name for m in MEASURES if m.compared]
    lines = [f"| method | strength | style score | {' | '.join(shown)} |", f"|---|---|---|{'---|' * len(shown)}"]
    for method, strength in dict.fromkeys((x["method"], x["strength"]) for x in result["comparisons"]):
        found = {x["measure"]: x for x in result["comparisons"] if (x["method"], x["strength"]) == (method, strength)}
        at = f"{strength:g}" if method in result["swept"] else ""
        style = next(iter(found.values()))["gap"]["style"]
        lines.append(f"| {names[method]} | {at} | {style:.3f} | {' | '.join(_gap(found[m]) for m in shown)} |")
    return lines


def _gap(entry: Mapping[str, Any]) -> str:
    gap = entry["gap"]
    if gap["difference"] is None:
        return f"{gap['side']} the curve"
    text = f"{gap['difference']:+.3f} ({gap['low']:+.2f} to {gap['high']:+.2f}) {entry['verdict']}"
    return text if gap["outside"] <= 0.05 else f"{text}, {gap['outside']:.0%} of resamples at the curve's end"


def as_json(found: Sequence[Row] | Sequence[Comparison]) -> list[dict[str, Any]]:
    return [asdict(entry) for entry in found]
