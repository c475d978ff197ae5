"""The scripts of docs/from-diffusers.md on small random models: both give the same image."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import condit
from condit.controls.ip_adapter import IPConfig
from sd_guests import shaken

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
# What a machine without a GPU changes.
ON_CPU = {"torch.float16": "torch.float32", '"cuda"': '"cpu"'}


@pytest.fixture
def folder(sd_pairs, tmp_path, monkeypatch) -> Path:
    """The files that the scripts name."""
    pair = sd_pairs("sdxl")
    width = pair.ours.backbone.config.cross_attention_dim
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapter = shaken(condit.IPAdapter.new(pair.ours, IPConfig(12, 4, width)), 0.3)  # diffusers counts on 4 tokens
    pair.theirs.save_pretrained(tmp_path / "stable-diffusion-xl-base-1.0")
    models = tmp_path / "IP-Adapter" / "sdxl_models"
    pair.image.model.save_pretrained(models / "image_encoder")
    save_file(adapter.tensors(), models / "ip-adapter_sdxl.safetensors")
    (tmp_path / "loras").mkdir()
    shutil.copy(pair.files["lora"], tmp_path / "loras" / "ink.safetensors")
    for seed, name in enumerate(("photo.png", "ref.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(which: str, *, without: str = "") -> np.ndarray:
    match = re.search(rf"<!-- {which} -->\n```python\n(.*?)```", PAGE, re.S)
    assert match is not None
    code = match[1].replace(without, "") if without else match[1]
    for there, here in ON_CPU.items():
        assert there in code
        code = code.replace(there, here)
    names: dict[str, object] = {}
    exec(code, names)
    return np.asarray(names["image"]).astype(int)


def test_a_script_of_diffusers_ports_by_its_import_and_a_line_for_each_adapter(folder):
    theirs, ours = run("diffusers"), run("condit")
    assert theirs.shape == (32, 32, 3) and np.abs(theirs - ours).max() <= 1  # a rounding of 8 bits
    for control in ('ip.control(Image.open("ref.png"), 0.6), ', ", ink.control(0.8)"):
        assert np.abs(run("condit", without=control) - ours).max() > 1  # both adapters act
