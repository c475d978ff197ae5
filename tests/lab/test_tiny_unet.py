"""The embedded UNet and its adapters: what is refused, and that what is shipped loads, draws and is steered."""

import random
from typing import Any

import numpy as np
import pytest
import torch

import condit
from condit.backbones.unet import PRESETS, UNet
from condit.controls.instantstyle import InstantStyle, preset
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import TinyImage
from condit.training.deadiff import DEADiffData, DEADiffTask
from condit.training.ip_adapter import IPAdapterData, IPAdapterTask
from condit.weights import catalog
from condit.weights.catalog import MODELS
from condit_lab.icons.world import sample_path
from condit_lab.training.unet import PROCESS

HOW: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}


@pytest.fixture
def folder(make_tiny_unet, tmp_path):
    return make_tiny_unet(tmp_path)


def test_the_preset_has_sdxls_blocks():
    with torch.device("meta"):
        unet = UNet(PRESETS["tiny-unet"])
    paths = {site.path.split(".transformer_blocks.")[0] for site in unet.sites}
    levels = {f"down_blocks.{i}.attentions.{n}" for i in (1, 2) for n in range(2)}
    assert paths == levels | {f"up_blocks.{i}.attentions.{n}" for i in (0, 1) for n in range(3)} | {
        "mid_block.attentions.0"
    }
    style = preset("style", unet)
    assert [s.path for s in unet.sites if s in style and s.kind == "cross"] == [
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2"
    ]


def test_both_solvers_generate_with_a_folder_which_keeps_its_process(folder):
    pipe = condit.load(folder)
    assert isinstance(pipe, Pipeline) and pipe.parts.process == PROCESS and pipe.parts.solver == "euler-ancestral"
    results = [pipe("a red apple", sampler=sampler, **HOW).images for sampler in (None, "dpm++", "ddim")]
    assert all(x.shape == (1, 32, 16, 16) and x.isfinite().all() for x in results)
    one = pipe(["a house", "a red apple"], **{**HOW, "seed": 4}).images[1]
    torch.testing.assert_close(one, results[0][0], rtol=0, atol=1e-4)  # a row of a batch is its single run


def test_a_missing_model_and_an_unsupported_scheduler_raise(folder, monkeypatch):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("EulerAncestralDiscreteScheduler", "LCMScheduler"))
    with pytest.raises(ValueError, match="unsupported scheduler 'LCMScheduler'"):
        condit.load(folder)
    monkeypatch.delitem(catalog.MODELS, "tiny")
    with pytest.raises(ValueError, match="text and autoencoder of the model 'tiny'"):
        condit.load(folder)


def test_adapters_are_trained_and_loaded_on_it_with_its_own_image_encoder(folder, tmp_path):
    pipe, icons, picture = condit.load(folder), str(sample_path()), np.full((128, 128, 3), 90, np.uint8)
    sizes = {"layers": 1, "queries": 2, "hidden": 8}
    results = [pipe("a rocket", **HOW).images]
    tasks = (
        IPAdapterTask(IPAdapterData(model=str(folder), icons=icons)),
        DEADiffTask(DEADiffData(model=str(folder), icons=icons, qformer=sizes)),
    )
    for task in tasks:
        loss, _ = task(task.batch(random.Random(0), 2), torch.Generator().manual_seed(0))
        loss.backward()
        task.export(tmp_path / type(task).__name__, {})
        kind = condit.DEADiff if isinstance(task, DEADiffTask) else condit.IPAdapter
        adapter = kind.load(tmp_path / type(task).__name__, pipe)
        results.append(pipe("a rocket", controls=[adapter.control(picture)], **HOW).images)
        assert not any(torch.equal(results[-1], other) for other in results[:-1])


shipped = pytest.mark.skipif("tiny-unet" not in MODELS, reason="a checkout without the embedded UNet")


@shipped
def test_the_shipped_unet_follows_the_prompt():
    pipe = condit.load("tiny-unet")
    assert pipe.backbone.config == PRESETS["tiny-unet"] and isinstance(pipe.image, TinyImage)
    red, blue = pipe(["a red apple", "a blue book"], seed=0, num_inference_steps=8, output_type="pt").images
    for picture, channel in ((red, 0), (blue, 2)):
        middle = picture[:, 40:88, 40:88].mean((1, 2))
        assert int(middle.argmax()) == channel
    corner = torch.stack([red, blue])[:, :, :6, :6]
    assert float(corner.mean()) > 0.8  # on white


@pytest.mark.skipif("tiny-unet/style" not in MODELS, reason="a checkout without the adapter")
def test_the_shipped_ip_adapter_and_instantstyle_act_in_their_blocks():
    pipe, picture = condit.load("tiny-unet"), np.full((128, 128, 3), 90, np.uint8)
    adapter = condit.IPAdapter.load("tiny-unet/style", pipe)
    plain = pipe("a rocket", **HOW).images
    assert torch.equal(pipe("a rocket", controls=[adapter.control(picture, strength=0.0)], **HOW).images, plain)
    style = InstantStyle.load("tiny-unet/style", pipe)
    results = [pipe("a rocket", controls=[c.control(picture)], **HOW).images for c in (adapter, style)]
    assert not torch.equal(results[0], plain) and not torch.equal(results[1], plain)
    assert not torch.equal(results[0], results[1])


@pytest.mark.skipif("tiny-unet/deadiff" not in MODELS, reason="a checkout without the adapter")
def test_the_shipped_deadiff_reads_with_the_models_own_tower():
    pipe, picture = condit.load("tiny-unet"), np.full((128, 128, 3), 90, np.uint8)
    adapter = condit.DEADiff.load("tiny-unet/deadiff", pipe)
    plain = pipe("a rocket", **HOW).images
    controls = adapter.control(style=picture), adapter.control(content=picture)
    results = [pipe("a rocket", controls=[c], **HOW).images for c in controls]
    assert not torch.equal(results[0], plain) and not torch.equal(results[0], results[1])


@pytest.mark.skipif("tiny-unet/style" not in MODELS, reason="a checkout without the adapter")
def test_words_are_subtracted_by_the_embedded_text_tower():
    """c lies where e lies: in the half that both towers share, at its scale, and nothing elsewhere."""
    pipe = condit.load("tiny-unet")
    style = InstantStyle.load("tiny-unet/style", pipe)
    words, picture = style.content(["a red apple", "grass"]), np.full((128, 128, 3), 200, np.uint8)
    shared = TinyImage.embedding.stop
    assert words.shape == (TinyImage.features,) and not words[shared:].any()
    e = style.adapter.features([picture])
    each = torch.stack([style.content(phrase) for phrase in ("a red apple", "grass")])
    torch.testing.assert_close(each[:, :shared].norm(dim=-1), e[:, :shared].norm(dim=-1).expand(2), rtol=1e-3, atol=0)
    torch.testing.assert_close(words, each.sum(0), rtol=0, atol=1e-4)
    control = style.control(picture, content=["a red apple", "grass"], content_scale=0.5)
    expected = style.adapter.reference(e - 0.5 * words, where=preset("style", pipe.backbone))
    for path, pair in expected.kv.items():
        torch.testing.assert_close(control.kv[path], pair, rtol=0, atol=1e-4)  # type: ignore[attr-defined]
