"""The embedded class models: DiT and DiffiT draw a style by its name, ViT tells it; what is embedded stays small."""

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.weights.catalog import MODELS, TINY
from condit_lab.icons.world import IconWorld, on_white, sample_path
from condit_lab.suites.measures import chroma


def test_all_that_is_embedded_stays_under_70_mb():
    assert sum(file.stat().st_size for file in TINY.parent.rglob("*.safetensors")) < 70e6  # the judge is among them


@pytest.mark.parametrize("name", ["small-dit", "small-diffit"])
def test_a_style_is_generated_by_its_name(name):
    if name not in MODELS:
        pytest.skip("a checkout without it")
    pipe = condit.load(name)
    assert isinstance(pipe, condit.ClassPipeline) and next(pipe.backbone.parameters()).dtype is torch.float32
    images = pipe(["noto-mono", "fluent-emoji-flat"] * 2, sampler="ddim", num_inference_steps=20, seed=0).images
    assert all(image.size == (128, 128) for image in images)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    gray, coloured = (float(chroma(pixels[start::2]).abs().mean()) for start in (0, 1))
    assert coloured > 3 * gray


@pytest.mark.skipif("small-vit" not in MODELS, reason="a checkout without it")
def test_the_vit_recognises_the_styles_of_icons():
    vit, world = condit.load("small-vit"), IconWorld.open(sample_path())
    assert isinstance(vit, condit.ViTPipeline)
    known = {vit.label(i) for i in range(vit.model.config.classes)}
    rows = [i for i, icon in enumerate(world.icons) if icon.style in known][::7]
    answers = vit.classify([Image.fromarray(on_white(world.rgba(i))) for i in rows], top_k=1)
    right = [answer.label == world.icons[i].style for (answer,), i in zip(answers, rows, strict=True)]
    assert len(right) >= 30 and sum(right) / len(right) > 0.6
