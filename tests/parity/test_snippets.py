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
from safetensors.torch import save_file

import condit
from condit.backbones.unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from condit.controls.ip_adapter import IPConfig
from condit.nn.lora import LoRA, linear_shapes
from sd_guests import shaken

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
ELSEWHERE = ("from_pretrained(", 'FLUX.1-dev"', "fill.safetensors", "def test_", "owner/", "h94/", "ms:", "push_to_hub")
QUOTED = re.compile(r"<!-- from \S+ -->\n```python\n.*?```", re.S)


def snippets(page: str) -> list[str]:
    text = QUOTED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [c for c in code if not any(part in c for part in ELSEWHERE) and not c.startswith("def ")]


# SDXL's eleven attention modules, which InstantStyle's presets name.
SDXL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "layers_per_block": 2,
    "attention_head_dim": (1, 1, 2),
    "transformer_layers_per_block": (1, 1, 1),
}


@pytest.fixture(scope="module")
def sdxl(make_sd, tmp_path_factory) -> tuple[Path, condit.IPAdapter, LoRA]:
    """The folder of a small SDXL, an adapter of it and a LoRA."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    make_sd("sdxl", **SDXL).save_pretrained(folder)
    pipe = condit.load(folder)
    adapter = condit.IPAdapter.new(pipe, IPConfig(12, 3, pipe.backbone.config.cross_attention_dim))
    return folder, shaken(adapter, 0.3), LoRA(linear_shapes(pipe.backbone, ("to_q",)), 2)


@pytest.fixture
def world(sd_pairs, sdxl, tmp_path, monkeypatch) -> Path:
    """A folder with small models under the names of published ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path / "home"))
    sd_pairs("sd15").theirs.save_pretrained(tmp_path / "stable-diffusion-v1-5")
    shutil.copytree(sdxl[0], tmp_path / "stable-diffusion-xl-base-1.0")
    for folder in (tmp_path / "home" / "models", tmp_path / "path" / "to"):
        for name in ("stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"):
            shutil.copytree(tmp_path / name, folder / name)
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
            save_file(sdxl[1].tensors(), tmp_path / folder / name)
        pair.image.model.save_pretrained(tmp_path / folder / "image_encoder")
    lora = {name.replace("transformer.", "unet.", 1): tensor for name, tensor in sdxl[2].tensors().items()}
    save_file(lora, tmp_path / "style.safetensors")
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
