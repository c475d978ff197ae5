"""The Python of README and of the pages runs, with small random models in the place of published ones."""

import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condit

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "README.zh.md",
    "docs/getting-started.md",
    "docs/models.md",
    "docs/tiny.md",
    "docs/write-a-control.md",
    "docs/papers/deadiff.md",
    "docs/papers/dit4edit.md",
    "docs/papers/instantstyle.md",
    "docs/papers/ip-adapter.md",
    "docs/papers/ominicontrol.md",
    "docs/papers/stable-diffusion.md",
    "docs/zh/getting-started.md",
    "docs/zh/models.md",
    "docs/zh/write-a-control.md",
)
# What no small model stands for: hubs, weights of the authors' layouts, code that is quoted from elsewhere.
ELSEWHERE = ("from_pretrained(", "FLUX.1", "fill.safetensors", "def test_", "owner/", "h94/", "ms:", "push_to_hub")
QUOTED = re.compile(r"<!-- from \S+ -->\n```python\n.*?```", re.S)


def snippets(page: str) -> list[str]:
    text = QUOTED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [c for c in code if not any(part in c for part in ELSEWHERE) and not c.startswith("def ")]


@pytest.fixture
def world(sd_pairs, tmp_path, monkeypatch) -> Path:
    """A folder with small models under the names of published ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path / "home"))
    for kind, name in (("sd15", "stable-diffusion-v1-5"), ("sdxl", "stable-diffusion-xl-base-1.0")):
        for folder in (tmp_path, tmp_path / "home" / "models", tmp_path / "path" / "to"):
            sd_pairs(kind).theirs.save_pretrained(folder / name)
    for kind, folder, name in (
        ("sd15", ".", "ip-adapter_sd15.bin"),
        ("sd15", "models", "ip-adapter_sd15.bin"),
        ("sdxl", ".", "ip-adapter_sdxl.safetensors"),
        ("sdxl", "sdxl_models", "ip-adapter_sdxl.safetensors"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        pair = sd_pairs(kind)
        if name.endswith(".bin"):
            adapter = condit.IPAdapter.load(pair.files["global"], pair.ours, image_encoder=pair.image)
            torch.save(adapter.tensors(), tmp_path / folder / name)
        else:
            shutil.copy(pair.files["global"], tmp_path / folder / name)
        pair.image.model.save_pretrained(tmp_path / folder / "image_encoder")
    shutil.copy(sd_pairs("sd15").files["lora"], tmp_path / "style.safetensors")
    load = condit.DEADiff.load.__func__  # type: ignore[attr-defined]
    pair = sd_pairs("sd15")
    stand_in = classmethod(lambda cls, _, pipe: load(cls, pair.files["deadiff"], pipe, image_encoder=pair.tower))
    monkeypatch.setattr(condit.DEADiff, "load", stand_in)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return tmp_path


def write_pictures(code: str) -> None:
    for name in re.findall(r'"([\w-]+\.png)"', code):
        small = np.random.default_rng(len(name)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        if name.startswith(("mask", "left", "right", "white")):
            small[:, :8], small[:, 8:] = 255, 0
        Image.fromarray(small.repeat(8, 0).repeat(8, 1)).save(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, world, sd_pairs, monkeypatch):
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look up annotations
    names = vars(module)
    names.update(condit=condit, torch=torch)
    ran = 0
    for code in snippets(page):
        write_pictures(code)
        if "interop.attach(pipe)" in code:
            names["pipe"] = sd_pairs("sd15").theirs
        elif "pipe = " not in code and "pipe" not in names:
            names["pipe"] = condit.load("sdxl" if "sdxl" in code else "tiny")
        exec(code.replace('"cuda"', '"cpu"'), names)
        ran += 1
    assert ran
