"""Training of the embedded UNet: what a step learns, exact resume, and that its export is a pipeline."""

import random
from dataclasses import replace

import pytest
import torch

import condit
from condit.backbones.unet import PRESETS, Transformer
from condit.data.images import to_images
from condit.drawing.pipeline import Pipeline
from condit.training.loop import Loop, LoopConfig
from condit.training.plugins import added_tasks
from condit.weights import tiny
from condit.weights.catalog import TINY
from condit.weights.tiny import UNET_INDEX
from condit_lab.training import unet, unet_joint
from condit_lab.training.unet import PROCESS, Silence, UNetTask
from condit_lab.training.unet_joint import UNetJointTask
from few_icons import few_icons

ICONS, MODEL = few_icons(), str(TINY / "model")
QFORMER = {"layers": 1, "queries": 2, "hidden": 16}
CONFIG = LoopConfig(steps=3, batch=4, lr=1e-3, precision="no", warmup=1, ema=0.0, decay=False, save_minutes=0.0)


@pytest.fixture
def make_task(monkeypatch):
    small = replace(PRESETS["tiny-unet"], block_out_channels=(16, 16, 16), attention_head_dim=1, norm_num_groups=4)
    monkeypatch.setitem(unet.PRESETS, "tiny-unet", small)
    monkeypatch.setattr(tiny, "STEPS", 2)  # of the sheets

    def make(**how) -> UNetTask:
        torch.manual_seed(0)
        task = UNetTask(ICONS, MODEL, **how)
        monkeypatch.setattr(task, "sheet", lambda: None)
        return task

    return make


def test_the_last_timestep_is_noise_alone_and_half_of_them_have_more_noise_than_image():
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
    assert isinstance(pipe, Pipeline) and pipe.size == (128, 128) and not pipe.model.repaints
    how = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    latents = pipe(["a red apple", "a house"], **how).images
    assert latents.shape == (2, 32, 16, 16) and not torch.equal(latents[0], latents[1])
    wide = pipe("a red apple", height=128, width=256, **how).images
    assert wide.shape == (1, 32, 16, 32)
    goes_on = make_task(init=str(tmp_path / "whole" / "export"))
    torch.testing.assert_close(goes_on.unet.conv_in.weight, whole.unet.conv_in.weight, rtol=0, atol=1e-3)


def test_the_adapter_trains_along_on_its_rows_alone_and_both_are_exported(make_task, monkeypatch, tmp_path):
    make_task()  # thin
    torch.manual_seed(0)
    adapters_too = {"style_share": 0.2, "plus_share": 0.2, "deadiff_share": 0.3, "qformer": QFORMER}
    task = UNetJointTask(ICONS, MODEL, **adapters_too)
    for p in task.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    batch = task.batch(random.Random(0), 10)
    assert [sum(len(x.captions) for x in part) for part in batch.parts().values()] == [3, 2, 2, 3]
    assert batch.plus is not None and torch.equal(batch.plus.images, batch.plus.references)
    assert [p.kind for p in batch.deadiff] == ["style", "content", "reconstruction"]
    named = {"styled": [batch.style], "plus": [batch.plus], "deadiff": batch.deadiff}
    before = task(batch, torch.Generator().manual_seed(0))[1]
    for name, rows in named.items():  # other references of an adapter: the loss of its rows alone is another
        kept = [x.references.clone() for x in rows]
        for x in rows:
            x.references.fill_(0.7)
        after = task(batch, torch.Generator().manual_seed(0))[1]
        assert {n for n in before if before[n] != after[n]} == {name}
        for x, references in zip(rows, kept, strict=True):
            x.references.copy_(references)
    task(batch, torch.Generator().manual_seed(0))[0].backward()
    for part in (task.unet, task.ip, task.plus, task.deadiff):
        assert part is not None and any(p.grad is not None and p.grad.any() for p in part.parameters())

    task.export(tmp_path, {})
    pipe = condit.load(tmp_path / "model")
    folders = {f"init_{name}": str(tmp_path / name) for name in ("style", "plus", "deadiff")}
    again = UNetJointTask(ICONS, MODEL, init=str(tmp_path / "model"), **folders, **adapters_too)
    loaded = {
        "ip": condit.IPAdapter.load(tmp_path / "style", pipe),
        "plus": condit.IPAdapter.load(tmp_path / "plus", pipe),
        "deadiff": condit.DEADiff.load(tmp_path / "deadiff", pipe),
    }
    for name, adapter in loaded.items():
        for inner, p in adapter.named_parameters():
            torch.testing.assert_close(p, getattr(task, name).get_parameter(inner), rtol=0, atol=1e-2)
            torch.testing.assert_close(p, getattr(again, name).get_parameter(inner), rtol=0, atol=1e-6)
    # As trained: features from the states of the embedded tower, no reference a gray picture.
    picture = to_images(batch.plus.images[:1])[0]
    control = loaded["plus"].control(picture)
    states = task.image.hidden(batch.plus.images[:1])
    for path, pair in loaded["plus"].keys_values(states).items():
        torch.testing.assert_close(control.kv[path], pair, rtol=0, atol=0.05)  # the picture in 8 bits
    gray = loaded["plus"].keys_values(task.image.hidden(torch.zeros(1, 3, 128, 128)))
    assert all(torch.equal(control.empty[path][0], k) for path, (k, _) in gray.items())


def test_shares_of_rows_that_are_more_than_all_are_refused(make_task):
    make_task()
    with pytest.raises(ValueError, match="at most 1"):
        UNetJointTask(ICONS, MODEL, style_share=0.6, deadiff_share=0.5)


def test_figures_and_sheet_of_the_joint_task(make_task, monkeypatch):
    make_task()
    task = UNetJointTask(ICONS, MODEL, plus_share=0.2, deadiff_share=0.3, qformer=QFORMER).eval()
    looks = UNetJointTask.looks
    monkeypatch.setattr(UNetJointTask, "looks", lambda task, count, *how: looks(task, 2, *how))
    expected = {"error_1.0", "wrong_reference_0.9", "no_reference_0.5", "plus_wrong_reference_0.5"}
    expected |= {f"deadiff_{kind}_no_reference_0.9" for kind in ("style", "content", "reconstruction")}
    assert expected <= task.validate().keys()
    assert task.sheet().size[0] > 0


def test_words_reach_it_by_their_states_alone(make_task):
    task = make_task()
    for p in task.unet.parameters():
        torch.nn.init.normal_(p, std=0.05)
    pipe, text = Pipeline(task.parts), task.text(["a red apple"])
    assert text.canvas is None and not text.pooled.numel()
    how = {"num_inference_steps": 2, "seed": 0, "output_type": "latent"}
    plain = pipe(text, **how).images
    assert not torch.equal(pipe(replace(text, tokens=text.tokens + 1), **how).images, plain)


def test_a_recipe_finds_the_task_and_the_index_its_loader():
    assert added_tasks()["text-to-image-unet"].load() is UNetTask
    assert UNET_INDEX["_class_name"].startswith("IconUNet")


def test_where_there_is_much_noise_the_mmdit_teaches_rows_without_a_reference_alone(make_task, monkeypatch):
    make_task()
    tasks = [UNetJointTask(ICONS, MODEL, style_share=0.5, taught_from=x) for x in (1.0, 0.4)]
    batch, seen = tasks[0].batch(random.Random(0), 4), []
    errors = unet_joint.errors
    monkeypatch.setattr(
        unet_joint, "errors", lambda parts, x0, *rest: seen.append(x0.clone()) or errors(parts, x0, *rest)
    )
    for task in tasks:
        task(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(seen[0][:2], seen[1][:2]) and torch.equal(seen[0][2:], seen[1][2:])


def test_a_silent_layer_adds_nothing_for_its_rows_and_all_layers_act_on_the_others(make_task):
    task = make_task(silent=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = Silence.draw(task.unet, 2000, 0.5, generator)
    speaks = torch.stack([x.flatten() for x in drawn.speaks.values()], 1)
    assert speaks.shape == (2000, 11) and set(speaks.unique().tolist()) == {0.0, 1.0}
    whole = speaks.all(1)
    assert 0.45 < float(whole.float().mean()) < 0.55
    assert 0.22 < float(speaks[~whole].mean()) < 0.28

    torch.nn.init.normal_(task.unet.conv_out.weight)
    for module in task.unet.modules():
        if isinstance(module, Transformer):
            torch.nn.init.normal_(module.proj_out.weight, std=0.1)
    x, t, words = torch.randn(2, 32, 16, 16, generator=generator), torch.tensor([500, 500]), torch.randn(2, 24, 192)
    one = Silence({path: torch.tensor([0.0, 1.0])[:, None, None, None] for path in drawn.speaks})
    with torch.no_grad():
        silent, plain, other = (
            task.unet(x, t, w, controls=c) for w, c in ((words, [one]), (words, []), (words.flip(1) * 2, [one]))
        )
    assert torch.equal(silent[1], plain[1]) and not torch.equal(silent[0], plain[0])
    assert torch.equal(silent[0], other[0]) and not torch.equal(silent[1], other[1])
    assert one.rows(slice(1, 2)).speaks.keys() == one.speaks.keys()
    assert make_task().silence(2, generator) == []
    with pytest.raises(ValueError, match=r"silent must be a share of the rows, from 0 to 1; found 2\."):
        make_task(silent=2.0)
