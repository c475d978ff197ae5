"""What the style evaluation measures of each picture, and whether its rulers tell style from content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condit.encoders.clip import CONCEPT, STYLE, embed_image, embed_text, token_ids
from condit.rulers import pixels
from condit.rulers.judge import Judge
from condit.rulers.statistics import auc
from condit_lab.icons.styles import style_of
from condit_lab.icons.world import GROUPS, TRAIN_LICENCES, Icon, IconWorld, family, hash_fraction
from condit_lab.suites import measures
from condit_lab.suites import style_measures as own
from condit_lab.suites.judge import is_for_judge
from condit_lab.suites.sets import pictures
from condit_lab.suites.tiny import make_bench

BANK, RULER_ICONS = 2000, 400
SCORE, ACCURACY, RETRIEVAL, WORDS = "style score", "style accuracy", "style retrieval", "style words (SS)"
LEAKAGE, OWN, LEAKS = "leakage, increase", "leakage above other references, increase", "leaks, increase"
LIKENESS = "likeness to the reference, increase"
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
        OWN,
        "the same less the mean cosine with the other references' labels: a picture that shows less of anything does "
        "not pass for one that leaks less",
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
    the judge's statistics (M, 448) scaled to unit length, with each one's reach; every label's embedding (C, 192)."""

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

    @torch.no_grad()
    def drawn(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """How pictures are drawn, apart from the CLIP: the judge's logits (N, S), which are blind to concepts, and its
        statistics (N, 448) of unit length, which know more of a picture."""
        statistics = self.judge.features(images)
        return self.judge.head(statistics).float(), self.scale(statistics)


def make_ruler(world: IconWorld, pipe: Any, judge: Judge | None = None) -> Ruler:
    """pipe: whose CLIP measures concepts (the embedded model's)."""
    bench = make_bench(world, pipe, judge)
    trained = [i for i, icon in enumerate(world.icons) if icon.split == "train" and usable(icon)]
    trained.sort(key=lambda i: hash_fraction(f"bank/{world.icons[i].style}/{world.icons[i].hex}"))
    features = bench.judge.features(pictures(world, trained[:BANK]))
    scale = own.Scale.of(features)
    bank = scale(features)
    return Ruler(bench.judge, bench.among, pipe, bench.labels, bench.texts, scale, bank, own.reach(bank))


def usable(icon: Icon) -> bool:
    return icon.group in GROUPS and icon.licence in TRAIN_LICENCES


@dataclass(frozen=True)
class Given:
    """What the pictures of a method are measured against: wanted icons, references' icons, references and true icons as
    pictures (N, 3, H, W) uint8, and the references' style features (unit logits)."""

    wanted: Sequence[Icon]
    icons: Sequence[Icon]
    references: Tensor
    true: Tensor
    features: Tensor

    @property
    def clusters(self) -> list[str]:
        return [icon.base for icon in self.wanted]


def own_values(ruler: Ruler, images: Tensor, given: Given) -> dict[str, Tensor]:
    """Measures of pictures for references whose style the judge does not know, (N,) each. The style score is the cosine
    of the judge's logits with those of the reference."""
    logits, statistics = ruler.drawn(images)
    concept = ruler.clip(images)[:, CONCEPT]
    labels = [icon.label for icon in given.icons]
    shown = ruler.words(labels)[:, CONCEPT]
    numbers = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    prompted = torch.tensor([ruler.labels.index(icon.label) for icon in given.wanted])
    references = [icon.hex for icon in given.icons]
    logits = F.normalize(logits, dim=-1)
    measured = {
        SCORE: own.cosines(logits, given.features),
        LEAKAGE: own.cosines(concept, shown),
        OWN: own.above_others(concept, shown, numbers),
        LIKENESS: similarity(images, given.references),
        ALIGNMENT: own.cosines(concept, ruler.texts[prompted]),
        TOP5: measures.concept_ranks(concept, ruler.texts, prompted) < 5,
        REALISTIC: own.realistic(statistics, ruler.bank, ruler.reaches),
    }
    if len(set(references)) > 1:
        measured[RETRIEVAL] = own.retrieved(logits, given.features, references)
    return {name: value.double() for name, value in measured.items()}


def values(ruler: Ruler, images: Tensor, given: Given) -> dict[str, Tensor]:
    """Every measure of every picture, (N,) each; increases still without their blank taken off."""
    if not {icon.style for icon in given.icons} <= set(ruler.judge.styles):
        return own_values(ruler, images, given)
    styles = [icon.style for icon in given.wanted]
    logits, statistics = ruler.drawn(images)
    said = ruler.judge.choose(logits, ruler.among)
    number = torch.tensor([ruler.judge.styles.index(style) for style in styles])
    embedded = ruler.clip(images)
    concept = embedded[:, CONCEPT]
    prompted = torch.tensor([ruler.labels.index(icon.label) for icon in given.wanted])
    shown = torch.tensor([ruler.labels.index(icon.label) for icon in given.icons])
    style_words = ruler.words([f"{style_of(style).name_en} style" for style in styles])
    measured = {
        SCORE: said.gather(1, number[:, None])[:, 0],
        ACCURACY: measures.agreement(said, number),
        WORDS: own.cosines(embedded[:, STYLE], style_words[:, STYLE]),
        LEAKAGE: own.cosines(concept, ruler.texts[shown]),
        OWN: own.above_others(concept, ruler.texts[shown], shown),
        LEAKS: measures.leaks(concept, ruler.texts, prompted, shown[:, None]),
        LIKENESS: similarity(images, given.references),
        ALIGNMENT: own.cosines(concept, ruler.texts[prompted]),
        TOP5: measures.concept_ranks(concept, ruler.texts, prompted) < 5,
        SUBJECT: similarity(images, given.true),
        REALISTIC: own.realistic(statistics, ruler.bank, ruler.reaches),
    }
    if len(set(styles)) > 1:  # with one style, its own reference is the only one
        measured[RETRIEVAL] = own.retrieved(F.normalize(logits, dim=-1), given.features, styles)
    return {name: value.double() for name, value in measured.items()}


def similarity(images: Tensor, others: Tensor) -> Tensor:
    """In parts, because fp32 maps of hundreds of pictures fill a laptop."""
    parts = zip(images.split(64), others.split(64), strict=True)
    return torch.cat([pixels.edge_similarity(a, b) for a, b in parts])


def check_rulers(ruler: Ruler, world: IconWorld) -> list[dict[str, Any]]:
    """Does each feature tell what it should, and is it blind to the rest? On real icons that the judge hasn't learned
    from: area under the ROC for pairs of one style (other concepts) against pairs of two styles, and for pairs of one
    concept (by other vendors) against pairs of two concepts. 0.5 is blind."""
    chosen = [i for i, icon in enumerate(world.icons) if icon.split == "concept" and usable(icon)]
    chosen.sort(key=lambda i: hash_fraction(f"ruler/{world.icons[i].style}/{world.icons[i].hex}"))
    chosen = [i for i in chosen if not is_for_judge(world.icons[i])][:RULER_ICONS]
    icons = [world.icons[i] for i in chosen]
    if len(icons) < 8:
        return []
    images = pictures(world, chosen)
    clip, (logits, statistics) = ruler.clip(images), ruler.drawn(images)
    features = {
        "judge's logits (style retrieval)": F.normalize(logits, dim=-1),
        "judge's statistics (realistic)": statistics,
        "CLIP's style half (SS)": clip[:, STYLE],
        "CLIP's concept half (TA, leakage)": clip[:, CONCEPT],
    }
    upper = torch.ones(len(icons), len(icons), dtype=torch.bool).triu(1)
    same = torch.tensor([[a.style == b.style for b in icons] for a in icons])
    vendor = torch.tensor([[family(a.style) == family(b.style) for b in icons] for a in icons])
    concept = torch.tensor([[a.base == b.base for b in icons] for a in icons])
    pairs = {
        "style": (same & ~concept & upper, ~same & ~concept & upper),
        "concept": (concept & ~vendor & upper, ~concept & ~vendor & upper),
    }
    areas = []
    for name, feature in features.items():
        scores = feature @ feature.T
        figures = {what: (scores[a], scores[b]) for what, (a, b) in pairs.items() if a.any() and b.any()}
        areas.append({"ruler": name, "icons": len(icons), **{k: round(auc(a, b), 4) for k, (a, b) in figures.items()}})
    return areas
