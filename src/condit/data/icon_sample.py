"""The sample of icons in the package: about a hundred concepts in 11 styles, as references for first steps."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

from PIL import Image

from condit.data.images import load_image


def sample_path() -> Path:
    """The packed sample: `index.tsv`, `concepts.json`, `ATTRIBUTION.md` and lossless RGBA WebP files of 128 px."""
    return Path(__file__).parent.parent / "assets" / "icons_sample" / "icons_sample.zip"


def sample_icon(style: str, label: str) -> Image.Image:
    """The icon of a concept (its English label) in a style, RGBA. ValueError if it is not in the sample."""
    with zipfile.ZipFile(sample_path()) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("index.tsv").decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in rows:
            if (row["style"], row["label"]) == (style, label):
                return load_image(Image.open(io.BytesIO(archive.read(f"{style}/{row['hex']}.webp"))), mode="RGBA")
    raise ValueError(f"The icon sample has no {label!r} in style {style!r}. Install condit again.")
