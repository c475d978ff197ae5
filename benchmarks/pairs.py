"""The sets of docs/pairs.md: images drawn by the embedded MM-DiT, and real icons of the icon world in the same styles.

python benchmarks/pairs.py draw OUT --subjects subjects.txt   # resumable; 10 styles, 4 images of each prompt
python benchmarks/pairs.py icons OUT --world WORLD --split train --count 1000
"""

import argparse
import json
import random
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

import condit
from condit.data.images import load_image, save_image
from condit.data.prompt_table import prompt_table, read_words
from condit.jobs.groups import Generator, groups_job
from condit.jobs.local import Rank
from condit.jobs.run import engine_of, run

STYLES = {  # the name that the embedded models know -> the style of the icon world
    "noto": "noto",
    "noto blob": "noto-v1",
    "fluent flat": "fluent-emoji-flat",
    "fluent high contrast": "fluent-emoji-high-contrast",
    "fluent 3d": "fluent-emoji-3d",
    "firefox": "fxemoji",
    "noto monochrome": "noto-mono",
    "twemoji": "twemoji",
    "emojione": "emojione",
    "emojione monochrome": "emojione-monotone",
}
TEMPLATE = "{subject}, {style} style"
IMAGES, STEPS, SEED = 4, 4, 0


@lru_cache(maxsize=1)
def pipeline() -> condit.Pipeline:
    return condit.load("tiny", dtype=torch.bfloat16)


def generate(prompt: str, seed: int, count: int) -> list[Image.Image]:
    return pipeline()([prompt] * count, seed=seed, num_inference_steps=STEPS).images


def draw(out: Path, subjects: Path) -> None:
    """Draws what is missing. Stopped with Ctrl-C, it writes metadata.jsonl of the images so far."""
    table = prompt_table(read_words(subjects), list(STYLES), per_subject=len(STYLES), template=TEMPLATE, seed=SEED)
    settings = {"model": "tiny", "dtype": "bfloat16", "steps": STEPS}
    job = groups_job(out, table, Generator(generate), images=IMAGES, seed=SEED, settings=settings)
    run(job, engine_of("local", 1, Rank()))


def icons(out: Path, world: Path, subjects: Path, split: str, count: int) -> None:
    from condit_lab.world import World

    opened, names = World.open(world), {key: name for name, key in STYLES.items()}
    chosen = [i for i in opened.where(splits=[split], details=False) if opened.rows[i].style in names]
    if split == "train":  # the drawn subjects, in the same order
        order = {subject: n for n, subject in enumerate(read_words(subjects))}
        chosen = sorted(
            (i for i in chosen if opened.rows[i].label_en in order), key=lambda i: order[opened.rows[i].label_en]
        )
    else:
        random.Random(SEED).shuffle(chosen)  # neighbours are each other's "another pair" in `condit evaluate adapter`
    chosen = chosen[:count]
    lines = []
    for i in chosen:
        row, name = opened.rows[i], f"images/{i}.png"
        save_image(load_image(Image.fromarray(opened.image[i])), out / name)
        groups = {"style_group": row.style, "content_group": row.label_en}
        columns = {"subject": row.label_en, "style": row.style, "licence": row.licence}
        text = TEMPLATE.format(subject=row.label_en, style=names[row.style])
        lines.append(json.dumps({"file_name": name, "text": text, **groups, **columns}, ensure_ascii=False))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "icons"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--subjects", type=Path, default=Path("subjects.txt"))
    parser.add_argument("--world", type=Path, default=Path("world"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.what == "icons":
        icons(arguments.out, arguments.world, arguments.subjects, arguments.split, arguments.count)
    else:
        draw(arguments.out, arguments.subjects)


if __name__ == "__main__":
    main()
