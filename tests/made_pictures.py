"""Pictures made to order from the packed icons: those of a copier, of a prompt-only method, of a perfect one."""

import csv
import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from condit.data.icon_sample import sample_path
from condit.data.images import load_image


class Icon(NamedTuple):
    style: str
    label: str
    member: str


class Task(NamedTuple):
    """An icon that is wanted, the reference of its style, and what is drawn without a reference."""

    name: str
    wanted: Icon
    reference: Icon
    blank: Icon


@cache
def icons() -> tuple[Icon, ...]:
    with zipfile.ZipFile(sample_path()) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("index.tsv").decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
        return tuple(Icon(row["style"], row["label"], f"{row['style']}/{row['hex']}.webp") for row in rows)


def tasks(styles: int, concepts: int) -> list[Task]:
    """Every concept once in a style in turn; its reference shows the concept before it, and what is drawn without a
    reference is in the style that follows."""
    by_style: dict[str, dict[str, Icon]] = defaultdict(dict)
    for icon in icons():
        by_style[icon.style][icon.label] = icon
    names = sorted(by_style, key=lambda s: -len(by_style[s]))[:styles]
    common = sorted(set.intersection(*(set(by_style[s]) for s in names)))[:concepts]
    made = []
    for i, label in enumerate(common):
        style, other, before = names[i % styles], names[(i + 1 + i // styles % (styles - 1)) % styles], common[i - 1]
        made.append(Task(f"{i:03d}", by_style[style][label], by_style[style][before], by_style[other][label]))
    return made


COPY, BLANK, PERFECT = (lambda task: task.reference), (lambda task: task.blank), (lambda task: task.wanted)


def write_study(folder: Path, made: list[Task], methods: Mapping[str, Callable[[Task], Icon]], size: int = 128) -> None:
    """OUTPUT, CONTENT and STYLE in a folder. methods: METHOD or METHOD/STRENGTH -> the icon of a task."""
    with zipfile.ZipFile(sample_path()) as archive:

        def save(icon: Icon, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            load_image(archive.read(icon.member)).resize((size, size)).save(path)

        rows: dict[str, list[dict[str, str]]] = {"output": [], "content": [], "style": []}
        for task in made:
            for role, icon in (("content", task.wanted), ("style", task.reference)):
                save(icon, folder / role / f"{task.name}.png")
                row = {"file_name": task.name, "text": icon.label, "content_group": icon.label}
                rows[role].append(row | {"style_group": icon.style, "style_text": icon.style.replace("-", " ")})
            rows["output"].append({"file_name": task.name, "text": task.wanted.label})
            for method, chosen in methods.items():
                save(chosen(task), folder / "output" / method / f"{task.name}.png")
    for role, lines in rows.items():
        (folder / role / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
