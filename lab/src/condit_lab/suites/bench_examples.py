"""Where single figures mislead: pairs of pictures from a run of `condit bench style`.

Each example compares two methods by one measure that prefers the first, although the second is the better transfer.
The picture has the pair with the largest difference; the table has the means over all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from condit.data.sheets import SheetCell, contact_sheet
from condit.rulers.distributions import frechet_distance
from condit.rulers.statistics import bootstrap
from condit_lab.suites import style_rulers as rulers
from condit_lab.suites.style import Key, Measured
from condit_lab.suites.style_methods import to_image

COUNTS = (25, 50, 100, 200, 400)  # icons of each set, for FID


@dataclass(frozen=True)
class Example:
    """measure: prefers `preferred` over `other`, both (method, strength). lower: whether less of it is better."""

    lesson: str
    measure: str
    preferred: Key
    other: Key
    lower: bool = False


EXAMPLES = (
    Example("A copy is the most similar to the reference", rulers.LIKENESS, ("copy", 1.0), ("real", 1.0)),
    Example("The judge of style cannot tell a copy from the true icon", rulers.SCORE, ("copy", 1.0), ("real", 1.0)),
    Example("No reference at all follows the words best", rulers.ALIGNMENT, ("none", 1.0), ("real", 1.0)),
    Example("Half the strength leaks less", rulers.LEAKAGE, ("unet-plus", 0.5), ("unet-plus", 1.0), lower=True),
)


def possible(run: Measured) -> list[Example]:
    """Those whose methods the run has."""
    return [example for example in EXAMPLES if {example.preferred, example.other} <= set(run.values)]


def picture(run: Measured) -> Image.Image | None:
    """An example a row: the reference, the true icon, the two pictures with their figures. None without examples."""
    given, rows, labels = run.given["style"], [], []
    for example in possible(run):
        a, b = (run.values[key][example.measure] for key in (example.preferred, example.other))
        i = int((b - a if example.lower else a - b).argmax())
        rows.append(
            [
                SheetCell(to_image(given.references[i]), given.icons[i].label, is_input=True),
                SheetCell(to_image(given.true[i]), given.wanted[i].label),
                *(
                    SheetCell(to_image(run.images[key][i]), f"{name_of(key)}: {float(values[i]):.2f}")
                    for key, values in ((example.preferred, a), (example.other, b))
                ),
            ]
        )
        labels.append(f"{example.lesson}: {example.measure.removesuffix(', increase')}")
    if not rows:
        return None
    title = "Reference, true icon, the preferred picture and the other one"
    return contact_sheet(rows, labels, title=title, cell=88, label_width=170)


def name_of(key: Key) -> str:
    """A method, with its strength if there are several."""
    name = key[0].removeprefix("unet-")
    return name if key[1] == 1.0 else f"{name} {key[1]:g}"


def markdown(run: Measured, fid: Mapping[int, float]) -> str:
    """The same as a table of means, and FID between two sets of real icons of the same icon world."""
    lines = ["| what a measure says | measure | preferred | other | difference (95 %) |", "|---|---|---|---|---|"]
    for example in possible(run):
        a, b = (run.values[key][example.measure] for key in (example.preferred, example.other))
        mean = bootstrap(a - b, run.given["style"].clusters)
        both = f"{name_of(example.preferred)} {float(a.mean()):.2f} | {name_of(example.other)} {float(b.mean()):.2f}"
        gap = f"{mean.value:+.2f} ({mean.low:+.2f} to {mean.high:+.2f})"
        lines.append(f"| {example.lesson} | {example.measure} | {both} | {gap} |")
    lines += ["", f"| icons of each set | {' | '.join(map(str, fid))} |", f"|---|{'---|' * len(fid)}"]
    lines.append(f"| FID of real icons to other real icons | {' | '.join(f'{x:.3f}' for x in fid.values())} |")
    return "\n".join(lines) + "\n"


def fid_by_count(features: Tensor) -> dict[int, float]:
    """FID between two random sets of the same n pictures: what it is when nothing differs. features (N, D)."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    counts = [count for count in COUNTS if 2 * count <= len(features)]
    return {n: frechet_distance(features[order[:n]], features[order[n : 2 * n]]) for n in counts}
