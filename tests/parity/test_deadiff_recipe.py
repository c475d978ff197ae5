"""A recipe of DEADiff on a Stable Diffusion that diffusers has saved, through `condit train`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import condit
from condit.controls.deadiff import DEADiff
from condit.training.run import read_recipe, train

RECIPE = """
task = "deadiff"

[data]
model = "{folder}/model"
tower = "{folder}/clip"
pairs = "{folder}/pairs"
qformer = {{ layers = 1, queries = 2, heads = 2 }}
content_layers = [0, 1]

[train]
steps = 2
batch = 1
precision = "no"
"""


@pytest.fixture
def folder(make_sd, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    make_sd("sd15").save_pretrained(tmp_path / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    vision.save_pretrained(tmp_path / "clip")
    (tmp_path / "pairs").mkdir()
    rows = []
    for i in range(4):
        Image.new("RGB", (20, 24), (60 * i, 0, 99)).save(tmp_path / "pairs" / f"{i}.png")
        rows.append(
            {"file_name": f"{i}.png", "text": "a fox", "style_group": f"s{i % 2}", "content_group": f"c{i // 2}"}
        )
    (tmp_path / "pairs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def test_a_recipe_trains_an_adapter_that_generates(folder):
    train(folder / "recipe.toml", out=folder / "run")
    pipe = condit.load(folder / "model")
    adapter = DEADiff.load(folder / "run" / "export", pipe, image_encoder=folder / "clip")
    reference = np.zeros((16, 16, 3), np.uint8)
    given = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    plain, drawn = (
        pipe("a fox", controls=c, **given).images for c in ((), (adapter.control(reference, content=reference),))
    )
    assert drawn.isfinite().all() and (drawn - plain).abs().max() > 1e-4


def test_the_shipped_recipe_is_of_this_task():
    recipe = read_recipe(Path(__file__).parent.parent.parent / "recipes" / "deadiff.toml")
    assert recipe.task == "deadiff" and not recipe.train.decay
