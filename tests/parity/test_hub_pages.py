"""The snippets of the pages on hubs and of the Chinese page on references run, on random models under the names that
the pages use."""

import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save

import condit
import hub_server
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.weights import stable_diffusion, tiny

DOCS = Path(__file__).parents[2] / "docs"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def repositories(make_sd, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """A Stable Diffusion and h94's IP-Adapter with its image encoder, at random."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    home = tmp_path_factory.mktemp("published")
    make_sd("sd15").save_pretrained(home / "sd")
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(tower).save_pretrained(home / "ip" / "models" / "image_encoder")
    adapter = IPAdapter.new(condit.load(home / "sd"), IPConfig(12, 4, 10))
    tensors = {name: tensor.clone().contiguous() for name, tensor in adapter.tensors().items()}
    (home / "ip" / "models" / "ip-adapter_sd15.safetensors").write_bytes(save(tensors))
    return {
        name: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name, folder in ((BASE, home / "sd"), ("h94/IP-Adapter", home / "ip"))
    }


@pytest.mark.parametrize("page", ["hub.md", "zh/hub.md", "zh/references.md"])
def test_the_snippets_of_a_page_run_in_order(page, hub, repositories, random_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr(tiny, "STEPS", 1)
    whole = stable_diffusion.assemble
    monkeypatch.setattr(stable_diffusion, "assemble", lambda *a, **k: replace(whole(*a, **k), steps=1))
    for name, files in repositories.items():
        hub.add(name, files)
    for name in ("ref.png", "car.png", "mask.png"):
        Image.new("RGB", (64, 64), "white" if name == "mask.png" else "red").save(name)
    names = types.ModuleType("page")
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for snippet in snippets:
        with torch.random.fork_rng():
            exec(snippet.replace('"cuda"', '"cpu"'), vars(names))
    if "hub" in page:
        private = hub.repos["me/my-adapter"].private
        assert private
        assert names.recipe["model"].startswith(f"{BASE}@")
