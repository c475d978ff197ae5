"""Files for the fuzzer: a random tiny model, adapters, images, recipes and pairs, all made once and copied for each
try."""

import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import condit
from condit.cli.request import Reference, Request, Studio
from condit.data.images import read_recipe, save_image
from condit.training import labelled
from condit.weights import catalog
from random_tiny import tiny_entries, write_tiny

SIDE = 32
MACHINE = 700_000_000  # bytes of memory that training may take, below what a try may


@dataclass(frozen=True)
class World:
    """base: the files that every try finds in its folder. tiny: the random model and its adapters."""

    root: Path
    base: Path
    tiny: Path
    recipe: dict

    def fresh(self) -> Path:
        """A new folder with the base's files."""
        shutil.rmtree(self.root / "try", ignore_errors=True)
        folder = Path(shutil.copytree(self.base, self.root / "try"))
        os.mkfifo(folder / "pipe.png")
        return folder

    def empty(self) -> Path:
        """A new folder without files."""
        shutil.rmtree(self.root / "try", ignore_errors=True)
        (self.root / "try").mkdir()
        return self.root / "try"

    @functools.cached_property
    def pipe(self) -> condit.Pipeline:
        return condit.load("tiny")


def make_world(root: Path) -> World:
    torch.set_num_threads(1)
    base, tiny = root / "base", write_tiny(root / "tiny")
    base.mkdir()
    catalog.MODELS.clear()
    catalog.MODELS.update(tiny_entries(tiny))
    labelled.machine_memory = lambda: MACHINE
    rng = np.random.default_rng(0)
    for name, shape in {"ref.png": (SIDE, SIDE, 3), "wide.jpg": (8, 40, 3), "alpha.png": (SIDE, SIDE, 4)}.items():
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(base / name)
    (base / "broken.png").write_bytes((base / "ref.png").read_bytes()[:100])
    (base / "text.txt").write_text("a fox\na rocket\n")
    (base / "set" / "t").mkdir(parents=True)
    for k in range(4):
        shutil.copy(base / "ref.png", base / "set" / "t" / f"{k}.png")
    rows = [
        {"file_name": f"t/{k}.png", "text": "a fox", "style_file_names": ["t/0.png"], "style_group": "a"}
        for k in range(4)
    ]
    (base / "set" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(base / "set" / "t", base / "classes" / "one")
    shutil.copytree(base / "set" / "t", base / "classes" / "two")
    shutil.copy(tiny / "style" / "adapter.safetensors", base / "style.safetensors")
    shutil.copy(tiny / "gray" / "adapter.safetensors", base / "gray.safetensors")
    request = Request("a fox", "tiny", (Reference("style", "ref.png"),), steps=1)
    here = Path.cwd()
    os.chdir(base)
    try:
        made = Studio("tiny").generate(request)
    finally:
        os.chdir(here)
    path = save_image(made.images[0], base / "made.png", recipe=made.recipes[0], parameters=made.parameters[0])
    return World(root, base, tiny, read_recipe(path))


@functools.cache
def world() -> World:
    """The world of this process."""
    return make_world(Path(tempfile.mkdtemp(prefix="fuzz-")))
