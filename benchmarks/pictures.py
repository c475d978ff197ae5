"""The pictures of docs/papers, drawn by the embedded models from icons of the packed sample.

    python benchmarks/pictures.py [omini ip-adapter deadiff classes] [--out docs/images] [--seed 0]

`classes` generates with the finished runs of small-dit, small-diffit and small-dit-adaln (lab/recipes): --runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import condit
from condit.data import annotators
from condit.data.images import save_image
from condit.data.sheets import SheetCell, contact_sheet
from condit_lab.icons.world import IconWorld, sample_path

Line = list[SheetCell | Image.Image | None]
HIGH_CONTRAST, THREE_D, FLAT, MONO = (
    "fluent-emoji-high-contrast",
    "fluent-emoji-3d",
    "fluent-emoji-flat",
    "emojione-monotone",
)
STRENGTHS = (0.0, 0.5, 1.0, 1.5)


class Icons:
    """Icons of the sample by style and label, on white."""

    def __init__(self) -> None:
        self.world = IconWorld.open(sample_path())

    def __call__(self, style: str, label: str) -> Image.Image:
        found = [i for i, icon in enumerate(self.world.icons) if (icon.style, icon.label) == (style, label)]
        if not found:
            raise SystemExit(f"the icon sample has no {label!r} in style {style}")
        icon = Image.fromarray(self.world.rgba(found[0]))
        return Image.alpha_composite(Image.new("RGBA", icon.size, "white"), icon).convert("RGB")


def drawn(pipe: Any, prompts: Sequence[str], controls: Sequence[Any], seed: int) -> list[Image.Image]:
    """Every prompt from the same noise."""
    return [pipe(prompt, controls=list(controls), seed=seed).images[0] for prompt in prompts]


def unworded(pipe: Any, control: Callable[[Image.Image], Any], icons: Icons, seed: int) -> list[SheetCell]:
    """Pictures of no words, from one noise, by references of their own."""
    of = [(FLAT, "automobile"), (HIGH_CONTRAST, "automobile"), (THREE_D, "tulip"), (FLAT, "crab")]
    return [SheetCell(drawn(pipe, [""], [control(icons(*x))], seed)[0], f"{x[1]}, {x[0][13:]}") for x in of]


def swept(
    pipe: Any,
    prompt: str,
    control: Callable[[float], Any],
    seed: int,
    name: str,
    strengths: Sequence[float] = STRENGTHS,
) -> Line:
    """One prompt at several strengths."""
    return [SheetCell(drawn(pipe, [prompt], [control(s)], seed)[0], f"{name} {s:g}") for s in strengths]


def given(image: Image.Image, caption: str) -> SheetCell:
    return SheetCell(image, caption, is_input=True)


def omini(icons: Icons, seed: int) -> tuple[list[Line], list[str]]:
    pipe = condit.load("tiny")
    gray, edges, subject, style = (
        condit.OminiControl.load(f"tiny/{name}", pipe) for name in ("gray", "edges", "subject", "style-tokens")
    )
    car, mushroom, crab = icons(FLAT, "automobile"), icons("noto", "mushroom"), icons("twemoji", "crab")
    key = icons(HIGH_CONTRAST, "key")
    words = ["", ", noto style", ", fluent 3d style", ", fluent high contrast style"]

    def shown(adapter: Any, picture: Image.Image, what: str, seen: Image.Image, name: str) -> Line:
        prompts = [what + more for more in words]
        images = drawn(pipe, prompts, [adapter.control(picture)], seed)
        return [
            given(seen, name),
            *(SheetCell(x, w.removeprefix(", ") or "no style word") for x, w in zip(images, words, strict=True)),
        ]

    rows: list[Line] = [
        [
            given(annotators.gray(car), "gray"),
            *swept(pipe, "an automobile", lambda s: gray.control(car, strength=s), seed, "strength"),
        ],
        shown(edges, mushroom, "a mushroom", annotators.lines(mushroom), "edges"),
        shown(subject, crab, "a crab", crab, "subject"),
        [
            given(key, "style"),
            *map(
                SheetCell,
                drawn(pipe, ["a red apple", "a penguin", "a rocket", "an umbrella"], [style.control(key)], seed),
                ["a red apple", "a penguin", "a rocket", "an umbrella"],
            ),
        ],
    ]
    return rows, [
        "gray -> colour\nshared positions",
        "edges\nshared positions",
        "subject\npositions with an offset",
        "style as tokens",
    ]


def ip_adapter(icons: Icons, seed: int) -> tuple[list[Line], list[str]]:
    tiny, unet = condit.load("tiny"), condit.load("tiny-unet")
    style = condit.IPAdapter.load("tiny/style", tiny)
    on_unet = condit.IPAdapter.load("tiny-unet/style", unet)
    key, tulip = icons(HIGH_CONTRAST, "key"), icons(THREE_D, "tulip")
    left = Image.new("L", key.size)
    left.paste(255, (0, 0, key.width // 2, key.height))
    shares = [[1.0, 0.0], [0.7, 0.3], [0.3, 0.7], [0.0, 1.0]]
    mixed = [
        SheetCell(
            drawn(tiny, ["a penguin"], [style.control([[key, tulip]], combine="mean", weights=w)], seed)[0],
            f"{w[0]:g} : {w[1]:g}",
        )
        for w in shares
    ]
    masked = drawn(
        tiny, ["a penguin", "a rocket", "an automobile", "a red apple"], [style.control(key, mask=left)], seed
    )
    plus = condit.IPAdapter.load("tiny-unet/plus", unet)
    rows: list[Line] = [
        [
            given(key, "reference"),
            None,
            *swept(tiny, "a rocket", lambda s: style.control(key, strength=s), seed, "lambda"),
        ],
        [given(key, "first"), given(tulip, "second"), *mixed],
        [given(key, "reference"), given(left.convert("RGB"), "mask"), *masked],
        [
            given(key, "reference"),
            None,
            *swept(unet, "a rocket", lambda s: on_unet.control(key, strength=s), seed, "lambda"),
        ],
        [None, None, *unworded(unet, plus.control, icons, seed)],
    ]
    return rows, [
        "MM-DiT, style",
        "two references, averaged by weights",
        "in one half of the picture",
        "UNet, style",
        "UNet, plus of these\nno words",
    ]


def deadiff(icons: Icons, seed: int) -> tuple[list[Line], list[str]]:
    pipe = condit.load("tiny-unet")
    dead = condit.DEADiff.load("tiny-unet/deadiff", pipe)
    key, guitar = icons(HIGH_CONTRAST, "key"), icons(MONO, "guitar")
    prompts = ["a red apple", "a penguin", "a rocket", "an umbrella"]
    car = icons(FLAT, "automobile")
    unnamed = [f"this, {style} style" for style in ("noto", "fluent 3d", "twemoji", "fluent high contrast")]

    def line(control: Any, words: Sequence[str], *pictures: SheetCell | None) -> Line:
        images = drawn(pipe, words, [control] if control is not None else [], seed)
        return [*pictures, *(SheetCell(x, w or "no words") for x, w in zip(images, words, strict=True))]

    rows = [
        line(None, prompts, None, None),
        line(dead.control(key), prompts, given(key, "style"), None),
        line(dead.control(guitar), prompts, given(guitar, "style"), None),
        [
            given(key, "style"),
            None,
            *swept(pipe, "a rocket", lambda m: dead.control(key, strength=m, acts="attention"), seed, "m"),
        ],
        line(dead.control(content=car), unnamed, given(car, "content"), None),
        [given(key, "style"), None, *unworded(pipe, lambda x: dead.control(key, content=x), icons, seed)],
    ]
    labels = [
        "no control",
        "style",
        "style of another",
        "strength",
        "content\nstyle by words",
        "style, and content of\nthese; no words",
    ]
    return rows, labels


def classes(runs: Path, seed: int) -> tuple[list[Line], list[str]]:
    rows: list[Line] = []
    shown = (
        "emojione-monotone",
        "fluent-emoji",
        "fluent-emoji-flat",
        "fluent-emoji-high-contrast",
        "noto-mono",
        "noto-v1",
    )
    names = {"small-dit": "DiT", "small-diffit": "DiffiT", "small-dit-adaln": "DiT,\nplain adaLN"}
    for run in names:
        pipe = condit.load(runs / run / "export", vae="tiny")
        images = pipe(list(shown), num_inference_steps=100, guidance_scale=3.0, seed=seed).images
        rows.append([SheetCell(x, name) for x, name in zip(images, shown, strict=True)])
    return rows, [*names.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages: dict[str, Callable[[Icons, int], tuple[list[Line], list[str]]]] = {
        "omini": omini,
        "ip-adapter": ip_adapter,
        "deadiff": deadiff,
    }
    parser.add_argument("names", nargs="*", choices=[*pages, "classes", []], default=[])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    icons = Icons()
    for name in asked.names or pages:
        rows, labels = classes(asked.runs, asked.seed) if name == "classes" else pages[name](icons, asked.seed)
        sheet = contact_sheet(rows, labels)
        print(save_image(sheet, asked.out / f"{name}.png"))


if __name__ == "__main__":
    main()
