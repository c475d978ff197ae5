"""One step of every training task on the committed icons, and what it exports is what the doors load."""

import json
import random
from pathlib import Path

import pytest
import torch

import condit
from condit.encoders.vae import encode_tokens
from condit.nn.streams import grid_ids
from condit.training.export import ADAPTER
from condit.training.loop import Loop, LoopConfig
from condit.weights.files import read_tensors, save_tensors
from condit.weights.tiny import load_clip, load_tiny
from condit.weights.vae import load_latent
from condit_lab.training.adapters import STYLE_GAIN, StyleTask, TokenTask
from condit_lab.training.clip import ClipTask
from condit_lab.training.joint import JointTask
from condit_lab.training.latent import LatentTask
from condit_lab.training.text_to_image import TextToImageTask, training_times
from few_icons import few_icons

ICONS = few_icons()
ONE_STEP = LoopConfig(steps=1, batch=8, precision="no", warmup=1, ema=0.0)


def one_step(task, out: Path, monkeypatch) -> Path:
    """The export of one step; figures and sheets cost more than the step and are looked at elsewhere."""
    monkeypatch.setattr(task, "sheet", lambda: None)
    monkeypatch.setattr(task, "validate", lambda: {})
    before = {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}
    Loop(task, ONE_STEP, out).run()
    moved = [n for n, p in task.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert moved, "no weight moved"
    return out / "export"


def test_latent_trains_a_step_and_loads(tmp_path, monkeypatch):
    task = LatentTask(ICONS)
    vae = load_latent(one_step(task, tmp_path, monkeypatch))
    images = task.held_out.images([0, 1])
    assert (vae.decode(vae.encode(images).latent_dist.mode()).sample - images).abs().mean() < 0.1


def test_clip_trains_a_step_and_loads(tmp_path, monkeypatch):
    folder = one_step(ClipTask(ICONS), tmp_path, monkeypatch)
    clip, tokenizer = load_clip(folder)
    assert len(tokenizer.encode(["a red apple"])[0].ids) >= 5
    assert clip.config.projection_dim == 256


def test_clip_goes_on_from_an_image_tower_and_refuses_another_file(tmp_path, random_tiny_folder):
    folder = random_tiny_folder / "model" / "clip"
    task = ClipTask(ICONS, init=str(folder))
    wanted = load_clip(folder)[0].vision_model.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in task.clip.vision_model.state_dict().items())
    save_tensors(tmp_path / "model.safetensors", {"vision_model.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing"):
        ClipTask(ICONS, init=str(tmp_path))


def test_training_sees_high_noise_most_and_low_noise_too():
    t = training_times(4000, torch.Generator().manual_seed(0))
    assert 0.6 < t.median() < 0.8 and (t < 0.2).float().mean() > 0.02 and t.min() > 0 and t.max() < 1


def test_text_to_image_trains_a_step_and_loads(tmp_path, monkeypatch, random_tiny_folder):
    model = random_tiny_folder / "model"
    task = TextToImageTask(ICONS, str(model / "clip"), str(model / "vae"))
    folder = one_step(task, tmp_path, monkeypatch)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["condit"]["prediction"] == "x"
    # Beside the latent and the CLIP that it was trained on, the export is a whole model.
    for part in ("clip", "vae"):
        (folder / part).symlink_to(model / part)
    assert load_tiny("trained", folder, torch.float32).prediction == "x"


def test_the_style_adapter_may_train_along_with_the_model_and_go_on_alone(tmp_path, monkeypatch, random_tiny_folder):
    model = random_tiny_folder / "model"
    task = JointTask(ICONS, str(model / "clip"), str(model / "vae"))
    folder = one_step(task, tmp_path, monkeypatch)
    for part in ("clip", "vae"):
        (folder / part).symlink_to(model / part)
    alone = StyleTask(ICONS, str(folder), init=str(folder / "style"))
    again = JointTask(ICONS, str(model / "clip"), str(model / "vae"), init=str(folder))
    for name, p in task.ip.named_parameters():
        for other in (alone, again):
            actual = dict(other.ip.named_parameters())[name]
            torch.testing.assert_close(actual, p, atol=2e-3, rtol=2e-3)  # written in fp16
    name = "ip_adapter.0.to_v_ip.weight"
    written = read_tensors(folder / "style" / ADAPTER)[name].float()
    torch.testing.assert_close(written, STYLE_GAIN * task.ip.get_parameter(name), atol=4e-3, rtol=4e-3)


def test_rows_without_a_reference_do_not_pass_through_the_style_adapter(random_tiny_folder):
    model = random_tiny_folder / "model"
    task = JointTask(ICONS, str(model / "clip"), str(model / "vae"))
    torch.nn.init.normal_(task.transformer.proj_out.weight)
    batch = task.batch(random.Random(0), 8)
    results = []
    for scale in (0.0, 1.0):
        for pair in task.ip.ip_adapter.values():
            torch.nn.init.normal_(pair.get_parameter("to_v_ip.weight"), std=scale)
        results.append(task(batch, torch.Generator().manual_seed(0))[1])
    assert results[0]["plain"] == results[1]["plain"]


def test_style_adapter_trains_a_step_and_loads(tmp_path, monkeypatch, random_tiny, random_tiny_folder):
    folder = one_step(StyleTask(ICONS, str(random_tiny_folder / "model")), tmp_path, monkeypatch)
    assert condit.IPAdapter.load(folder, condit.load("tiny")).config.tokens == 4


@pytest.mark.parametrize("kind", ["subject", "edges", "gray", "style"])
def test_token_adapters_train_a_step_and_load(kind, tmp_path, monkeypatch, random_tiny, random_tiny_folder):
    folder = one_step(TokenTask(ICONS, str(random_tiny_folder / "model"), kind=kind, rank=4), tmp_path, monkeypatch)
    adapter = condit.OminiControl.load(folder, condit.load("tiny"))
    assert adapter.config.independent
    assert adapter.config.delta == ((0, 0) if kind in ("edges", "gray") else (0, -8))


def test_a_token_adapter_goes_on_at_a_higher_rank_as_it_was(tmp_path, monkeypatch, random_tiny_folder):
    model = str(random_tiny_folder / "model")
    task = TokenTask(ICONS, model, kind="gray", rank=4, t_mean=(2.0, 0.0))
    torch.nn.init.normal_(next(iter(task.omini.lora.b.values())))
    folder = one_step(task, tmp_path, monkeypatch)
    wider = TokenTask(ICONS, model, kind="gray", rank=6, init=str(folder))
    assert wider.omini.lora.rank == 6
    for path, key in task.omini.lora.keys.items():
        x = torch.randn(3, task.omini.lora.a[key].shape[1])
        there, here = wider.omini.lora.delta(path, x), task.omini.lora.delta(path, x)
        torch.testing.assert_close(there, here, atol=2e-2, rtol=2e-2)  # written in fp16
    with pytest.raises(ValueError):
        TokenTask(ICONS, model, kind="gray", rank=2, init=str(folder))
    fewer = one_step(
        TokenTask(ICONS, model, kind="gray", rank=4, export_rank=3, init=str(folder)), tmp_path / "fewer", monkeypatch
    )
    assert max(len(x) for n, x in read_tensors(fewer / ADAPTER).items() if "lora_A" in n) == 3


def test_adapter_training_leaves_the_base_alone(tmp_path, monkeypatch, random_tiny_folder):
    task = TokenTask(ICONS, str(random_tiny_folder / "model"), kind="gray", rank=4)
    before = {k: v.clone() for k, v in task.transformer.state_dict().items()}
    one_step(task, tmp_path, monkeypatch)
    assert all(torch.equal(v, before[k]) for k, v in task.transformer.state_dict().items())


def test_a_condition_walks_from_the_images_place_to_its_own(random_tiny_folder):
    model = str(random_tiny_folder / "model")
    task, there = TokenTask(ICONS, model, rank=4, walk=(0.2, 0.6)), grid_ids(8, 8, delta=(0, -8))
    values = {}
    for task.progress in (0.0, 0.2, 0.4, 0.6, 1.0):
        values[task.progress] = task.positions()
    assert torch.equal(values[0.0], grid_ids(8, 8)) and torch.equal(values[0.2], grid_ids(8, 8))
    torch.testing.assert_close(values[0.4], grid_ids(8, 8, delta=(0, -4)))
    assert torch.equal(values[0.6], there) and torch.equal(values[1.0], there)
    assert torch.equal(TokenTask(ICONS, model, rank=4).positions(), there)


def test_references_take_the_place_of_the_target_row_by_row(random_tiny_folder):
    task = TokenTask(ICONS, str(random_tiny_folder / "model"), kind="subject", rank=4, leave=(0.3, 0.5))
    batch, keep = task.batch(random.Random(0), 8), torch.zeros(8, dtype=torch.bool)
    text = task.text(batch.captions)
    target, other = (encode_tokens(task.vae, images) for images in (batch.images, batch.references[:, 0]))
    assert batch.lots is not None
    for task.progress, share in ((0.1, 0.0), (0.4, 0.5), (0.9, 1.0)):
        ((stream,), _) = task.conditions(batch, text, keep)
        seen = stream.tokens[..., : target.shape[-1]]
        for row, lot in enumerate(batch.lots):
            torch.testing.assert_close(seen[row], (other if lot < share else target)[row])


@pytest.mark.parametrize("name", ["walk", "leave"])
@pytest.mark.parametrize("part", [(0.6, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.5), (0.5,)])
def test_shares_of_a_run_that_are_none_are_refused(name, part, random_tiny_folder):
    with pytest.raises(ValueError, match=f"{name} needs two shares"):
        TokenTask(ICONS, str(random_tiny_folder / "model"), rank=4, **{name: part})
