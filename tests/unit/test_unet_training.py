"""Training of the embedded UNet: what a step learns, exact resume, and that its export is a pipeline."""

import random
from dataclasses import replace

import pytest
import torch

import condit
from condit.backbones.unet import PRESETS
from condit.data.icons import sample_path
from condit.latent_pipeline import LatentPipeline
from condit.training import adapters, unet, unet_joint
from condit.training.loop import Loop, LoopConfig
from condit.training.run import tasks
from condit.training.unet import PROCESS, UNetTask
from condit.training.unet_joint import UNetJointTask
from condit.weights.catalog import TINY
from condit.weights.tiny_unet import INDEX

ICONS, MODEL = str(sample_path()), str(TINY / "model")
CONFIG = LoopConfig(steps=4, batch=4, lr=1e-3, precision="no", warmup=1, ema=0.0, decay=False, save_minutes=0.0)


@pytest.fixture
def make_task(monkeypatch):
    small = replace(PRESETS["tiny-unet"], block_out_channels=(16, 16, 16), attention_head_dim=1, norm_num_groups=4)
    monkeypatch.setitem(unet.PRESETS, "tiny-unet", small)

    def make(**how) -> UNetTask:
        torch.manual_seed(0)
        task = UNetTask(ICONS, MODEL, **how)
        monkeypatch.setattr(task, "sheet", lambda: None)
        return task

    return make


def test_the_last_timestep_is_noise_alone_and_half_of_them_have_more_noise_than_picture():
    levels = PROCESS.alphas_cumprod
    assert float(levels[-1]) < 1e-6 and float(levels[0]) > 0.998
    assert 0.6 < float((levels < 0.5).float().mean()) < 0.7


def test_an_untrained_network_predicts_nothing_and_its_last_layer_learns_first(make_task):
    task = make_task()
    loss, _ = task(task.batch(random.Random(0), 4), torch.Generator().manual_seed(0))
    assert 0.8 < float(loss.detach()) < 1.2  # v has unit variance
    loss.backward()
    learns = {n for n, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"unet.conv_out.weight", "unet.conv_out.bias"}


def test_a_run_that_stops_continues_bit_by_bit_and_its_export_is_a_pipeline(make_task, tmp_path):
    whole = make_task()
    figures = Loop(whole, CONFIG, tmp_path / "whole").run()
    assert {"error_1.0", "wrong_words_0.9"} <= figures.keys()
    Loop(make_task(), CONFIG.model_copy(update={"steps": 2}), tmp_path / "parts").run()
    parts = make_task()
    Loop(parts, CONFIG, tmp_path / "parts").run()
    assert all(torch.equal(p, parts.get_parameter(n)) for n, p in whole.named_parameters())
    assert not torch.equal(whole.unet.conv_in.weight, make_task().unet.conv_in.weight)

    pipe = condit.load(tmp_path / "whole" / "export")
    assert isinstance(pipe, LatentPipeline) and pipe.size == (128, 128) and not pipe.repaints
    how = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    told = pipe(["a red apple", "a house"], **how).images
    assert told.shape == (2, 32, 16, 16) and not torch.equal(told[0], told[1])
    wide = pipe("a red apple", height=128, width=256, **how).images
    assert wide.shape == (1, 32, 16, 32)
    goes_on = make_task(init=str(tmp_path / "whole" / "export"))
    torch.testing.assert_close(goes_on.unet.conv_in.weight, whole.unet.conv_in.weight, rtol=0, atol=1e-3)


def test_the_adapter_trains_along_on_its_rows_alone_and_both_are_exported(make_task, monkeypatch, tmp_path):
    make_task()  # thin
    torch.manual_seed(0)
    task = UNetJointTask(ICONS, MODEL)
    for p in (*task.unet.parameters(), *task.ip.parameters()):
        torch.nn.init.normal_(p, std=0.2)
    batch = task.batch(random.Random(0), 10)
    assert len(batch.captions) == 10 and len(batch.references) == 4
    seen = []
    for value in (0.0, 1.0):  # another reference: the loss of the rows without one stays
        batch.references.fill_(value)
        seen.append(task(batch, torch.Generator().manual_seed(0))[1])
    assert seen[0]["plain"] == seen[1]["plain"] and seen[0]["styled"] != seen[1]["styled"]
    task(batch, torch.Generator().manual_seed(0))[0].backward()
    assert task.unet.conv_in.weight.grad is not None and task.ip.image_proj.proj.weight.grad is not None  # type: ignore[union-attr]

    task.export(tmp_path, {})
    pipe = condit.load(tmp_path / "model")
    adapter = condit.IPAdapter.load(tmp_path / "style", pipe)
    again = UNetJointTask(ICONS, MODEL, init=str(tmp_path / "model"), init_style=str(tmp_path / "style"))
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p, task.ip.get_parameter(name), rtol=0, atol=1e-2)
        torch.testing.assert_close(p, again.ip.get_parameter(name), rtol=0, atol=1e-6)


def test_figures_and_sheet_of_the_joint_task(make_task, monkeypatch):
    make_task()
    task = UNetJointTask(ICONS, MODEL).eval()
    few = adapters.style_examples
    monkeypatch.setattr(unet_joint, "style_examples", lambda task, icons, count: few(task, icons, 2))
    assert {"error_1.0", "wrong_reference_0.9", "no_reference_0.5"} <= task.validate().keys()
    assert task.sheet().size[0] > 0


def test_the_canvas_is_seen_and_the_text_read(make_task):
    task = make_task()
    for p in task.unet.parameters():
        torch.nn.init.normal_(p, std=0.05)
    pipe = LatentPipeline(task.parts)
    text = task.text(["a red apple"])
    how = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    plain = pipe(text, **how).images
    for part in ("tokens", "pooled", "canvas"):
        changed = replace(text, **{part: getattr(text, part) + 1})
        assert not torch.equal(pipe(changed, **how).images, plain), part


def test_a_recipe_finds_the_task_and_the_index_its_loader():
    assert tasks()["text-to-image-unet"] is UNetTask
    assert INDEX["_class_name"].startswith("IconUNet")
