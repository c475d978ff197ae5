"""A packed icon world of fourteen concepts of the sample: tests open it and encode all of it in little time."""

import atexit
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from condit_lab.icons.world import IconWorld, sample_path, write_index

# Of training, of held-out combinations (rocket, maple leaf), held-out concepts (bear, tulip) and the held-out style.
CONCEPTS = (
    *("bear", "birthday cake", "cat", "cloud", "crescent moon", "fire", "guitar", "house", "maple leaf", "pizza"),
    *("red apple", "rocket", "soccer ball", "tulip"),
)


@cache
def few_icons() -> str:
    """The path of the file, which lasts as long as the process."""
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    world = IconWorld.open(sample_path())
    icons = [icon for icon in world.icons if icon.label in CONCEPTS]
    file = Path(folder.name) / "few_icons.zip"
    with zipfile.ZipFile(sample_path()) as sample, zipfile.ZipFile(file, "w") as few:
        few.writestr("index.tsv", write_index(icons))
        for name in ("concepts.json", "ATTRIBUTION.md", *(icon.member for icon in icons)):
            few.writestr(name, sample.read(name))
    return str(file)
