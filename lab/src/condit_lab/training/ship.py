"""Finished runs -> the folders under `assets/` that `condit.load` reads by name: weights, cards with their curves,
attribution. `python -m condit_lab.training.ship`."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from condit.weights.catalog import CLASSES, PIXART, TINY, UNET
from condit.weights.files import COMPLETE, read_metadata, read_tensors, save_folder, save_tensors

# Part of the model -> (run, folder within its export).
MODEL = {
    "model/clip": ("tiny-clip", "."),
    "model/vae": ("tiny-decoder", "."),
    "model/transformer": ("tiny-fine", "transformer"),
    "model/canvas": ("tiny-fine", "canvas"),
}
ADAPTERS = {
    "style": ("tiny-fine", "style"),  # trained along with the transformer
    "style-tokens": ("tiny-style-tokens", "."),
    "subject": ("tiny-subject", "."),
    "edges": ("tiny-edges", "."),
    "gray": ("tiny-gray", "."),
}


@dataclass(frozen=True)
class Family:
    """A model and its adapters, by the folder that each has in `folder`."""

    folder: Path
    model: Mapping[str, tuple[str, str]]
    adapters: Mapping[str, tuple[str, str]]
    half: bool = False  # its exports hold float32, which is shipped as float16


FAMILIES = {
    "tiny": Family(TINY, MODEL, ADAPTERS),
    "tiny-unet": Family(
        UNET,
        {"model": ("small-unet-adapters", "model")},
        {name: ("small-unet-adapters", name) for name in ("style", "plus", "deadiff")},
    ),
    "tiny-pixart": Family(PIXART, {"model": ("small-pixart", ".")}, {}),
    "small-classes": Family(CLASSES, {n: (f"small-{n}", ".") for n in ("dit", "diffit", "vit")}, {}, half=True),
}
LICENCE = "Apache-2.0"
DATA = "icons under Apache-2.0, MIT, OFL-1.1 and CC-BY-4.0, training split only (ATTRIBUTION.md)"
CURVE_POINTS = 24


def curve(log: Path) -> list[dict]:
    """The run's log, thinned to a few points: step, loss, images/s."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    # A resumed run repeats the steps after its checkpoint: the last row of a step counts.
    losses = list({r["step"]: r for r in rows if "loss" in r}.values())
    every = max(1, len(losses) // CURVE_POINTS)
    return [{k: r[k] for k in ("step", "loss", "images_per_s")} for r in losses[::every]]


def card_of(run: Path, inner: str) -> dict:
    own = run / "export" / inner / "card.json"
    card = json.loads((own if own.is_file() else run / "export" / "card.json").read_text(encoding="utf-8"))
    return {**card, "data": DATA, "licence": LICENCE, "curve": curve(run / "log.jsonl")}


def copy_part(source: Path, target: Path, *, half: bool = False) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("card.json"))
    for file in target.rglob("*.safetensors") if half else ():
        tensors = {name: x.half() if x.is_floating_point() else x for name, x in read_tensors(file).items()}
        save_tensors(file, tensors, read_metadata(file))


def ship(
    runs: Path, out: Path, attribution: Sequence[Path] = (), *, only: Sequence[str] = (), family: str = "tiny"
) -> Path:
    """Assemble what is there of a family under `runs` (one folder a recipe) into `out`, whole or not at all.

    only: names of parts; the rest of `out` stays as it is, with its cards and attribution.
    """
    model, adapters = FAMILIES[family].model, FAMILIES[family].adapters
    parts = {**model, **adapters}
    if unknown := sorted(set(only) - set(parts)):
        raise ValueError(f"No part {unknown[0]!r} is shipped. Choose from: {', '.join(parts)}.")
    if not only and not attribution:
        raise ValueError("The whole model needs attribution=, the ATTRIBUTION.md files of its data.")
    with save_folder(out) as folder:
        if only:
            shutil.copytree(out, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(COMPLETE))
            cards = json.loads((folder / "cards.json").read_text(encoding="utf-8"))
        else:
            cards = {}
            texts = [path.read_text(encoding="utf-8").strip() for path in attribution]
            (folder / "ATTRIBUTION.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        for name in only or parts:
            run, inner = parts[name]
            if (runs / run / "export" / inner).is_dir():
                copy_part(runs / run / "export" / inner, folder / name, half=FAMILIES[family].half)
                cards[name] = card_of(runs / run, inner)
            elif only or name in model:
                raise ValueError(f"{runs / run} has no export yet; run recipes/{run}.toml to its end.")
        cards = {name: cards[name] for name in parts if name in cards}
        (folder / "cards.json").write_text(json.dumps(cards, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme(cards), encoding="utf-8")
    return out


def readme(cards: dict[str, dict]) -> str:
    """The model card that people read."""
    lines = [
        "# The embedded models",
        "",
        f"Licence: {LICENCE}. Data: {DATA}. Made by `recipes/*.toml`; how and with which figures: `docs/tiny.md`.",
        "Curves and all validation figures: `cards.json`.",
        "",
        "| part | steps | images seen | training minutes | last figures |",
        "|---|---|---|---|---|",
    ]
    for name, card in cards.items():
        figures = ", ".join(f"{k} {v}" for k, v in card["figures"].items())
        lines.append(
            f"| {name} | {card['steps']} | {card['images_seen']:,} | {card['seconds'] / 60:.0f} | {figures or '-'} |"
        )
    lines += ["", "Limits: icons of 128 px; concepts and styles of the training sets; trained on CPU cores."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m condit_lab.training.ship", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--family", choices=[*FAMILIES], default="tiny")
    parser.add_argument("--out", type=Path, help="instead of the family's own folder")
    parser.add_argument("--attribution", type=Path, nargs="+", default=[], help="ATTRIBUTION.md of the data used")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts; the rest stays")
    given = parser.parse_args(arguments)
    out = given.out or FAMILIES[given.family].folder
    print(ship(given.runs, out, given.attribution, only=given.only, family=given.family))


if __name__ == "__main__":
    main()
