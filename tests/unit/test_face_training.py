"""Training of FaceID's form from given vectors, on the embedded UNet."""

import json
import random
from pathlib import Path

import pytest
import torch

import condit
from condit.controls.ip_adapter import IPAdapter
from condit.data.icon_sample import sample_icon
from condit.training.denoising import errors, latents_of
from condit.training.ip_adapter import IPAdapterData, IPAdapterTask
from condit.weights.files import save_tensors

WIDTH, ICONS = 6, ("red apple", "automobile")


@pytest.fixture
def faces(tmp_path) -> Path:
    """Two images, each with a vector of its own."""
    (tmp_path / "set").mkdir()
    names = [f"{k}.png" for k in range(2)]
    for name, icon in zip(names, ICONS, strict=True):
        sample_icon("noto", icon).convert("RGB").save(tmp_path / "set" / name)
    rows = [{"file_name": name, "text": "a thing"} for name in names]
    (tmp_path / "set" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vectors = torch.eye(WIDTH)[:2]
    save_tensors(tmp_path / "faces.safetensors", {f"set/{n}": v for n, v in zip(names, vectors, strict=True)})
    return tmp_path


@pytest.fixture
def make_task(faces):
    def make(**how) -> IPAdapterTask:
        torch.manual_seed(0)
        data = {"model": "tiny-unet", "pairs": str(faces / "set"), "faces": str(faces / "faces.safetensors")}
        return IPAdapterTask(IPAdapterData(**{**data, "projector": "face", "drop": (0, 0, 0), **how}))

    return make


def gain(task: IPAdapterTask, seed: int) -> float:
    """By which share the error is larger with the other image's face."""
    pairs = task.batch(random.Random(seed), 4).pairs
    assert set(pairs.captions) == {"a thing"}
    swapped = pairs.references[:, [1, 0, *range(2, WIDTH)]]
    with torch.no_grad():
        x0, text = latents_of(task.vae, pairs.images, None), task.text(pairs.captions)
        noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)), torch.full((4,), 700)
        controls = ([task.acting(task.features(faces, torch.ones(4)))] for faces in (pairs.references, swapped))
        right, wrong = (errors(task.parts, x0, noise, t, text, c, pairs.frames).mean() for c in controls)
    return float(wrong / right - 1)


def test_it_learns_which_face_is_in_the_image_and_load_reads_its_export(make_task, tmp_path):
    task = make_task(lora_rank=2)
    learns = {n for n, p in task.named_parameters() if p.requires_grad}
    assert learns == {n for n, _ in task.named_parameters() if n.startswith("ip.")}
    assert any(".lora." in name for name in learns)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    for step in range(15):
        loss, _ = task(task.batch(random.Random(step), 2), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(gain(task, seed) for seed in (0, 1)) > 0.005
    assert task.ip.lora is not None and all(p.abs().sum() > 0 for p in task.ip.lora.b.values())
    task.export(tmp_path / "export", {"steps": 15})
    pipe = condit.load("tiny-unet")
    adapter = IPAdapter.load(tmp_path / "export", pipe)
    assert adapter.face_width == WIDTH and adapter.config.feature == "identity" and adapter.lora is not None
    saved = task.ip.tensors()
    assert all(torch.equal(tensor, saved[name].half().float()) for name, tensor in adapter.tensors().items())
    adapter.control(identity=torch.eye(WIDTH)[:1])


def test_what_does_not_fit_is_refused_by_name(make_task, faces):
    for fields, message in (
        ({"faces": None}, "need each other"),
        ({"projector": "global", "lora_rank": 2, "faces": None}, "lora_rank is for"),
        ({"init": "x"}, "init is not read"),
        ({"icons": "icons", "pairs": None}, "set pairs, not icons"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(**fields)
    save_tensors(faces / "few.safetensors", {"set/0.png": torch.ones(WIDTH)})
    with pytest.raises(ValueError, match=r"no face vector for set/1.png; found set/0.png"):
        make_task(faces=str(faces / "few.safetensors")).batch(random.Random(0), 8)
    save_tensors(faces / "odd.safetensors", {"set/0.png": torch.ones(WIDTH), "set/1.png": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"expected a vector \(E,\) for each image, all of one length"):
        make_task(faces=str(faces / "odd.safetensors"))
