"""Small tasks of `condit.training` on classes: their pictures, autoencoder, sizes and runs."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig
from condit.training.class_conditional import ClassConditionalData, ClassConditionalTask
from condit.training.classify import ClassifyData, ClassifyTask
from condit.training.loop import Loop, LoopConfig, Task
from condit.training.pixels import PixelData, PixelTask
from condit.weights.files import save_tensors
from condit.weights.folders import WEIGHTS

ONE_STEP = LoopConfig(steps=1, batch=4, precision="no", warmup=1, ema=0.0)
SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2}
VIT = {"patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
PIXELS = {"blocks": [1, 1], "widths": [8, 16], "window": 4, "time_dim": 12, "time_features": 8, "head_dim": 4}
RUN = LoopConfig(steps=4, batch=4, lr=1e-2, precision="no", warmup=1, ema=0.5, save_minutes=0.0)


def write_vae(folder: Path, patch: int, **config) -> str:
    """A `PatchAutoencoder` of four channels with an orthonormal random code."""
    torch.manual_seed(0)
    settings = PatchAutoencoderConfig(patch=patch, latent_channels=4, width=8, depth=1, **config)
    vae = PatchAutoencoder(settings)
    vae.basis.copy_(torch.linalg.qr(torch.randn(3 * patch * patch, 4))[0].T)
    save_tensors(folder / WEIGHTS, vae.state_dict())
    (folder / "config.json").write_text(json.dumps(asdict(settings)))
    return str(folder)


def write_pictures(folder: Path, *, count: int = 14, size: tuple[int, int] = (48, 32)) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> str:
    return write_vae(tmp_path_factory.mktemp("vae"), 4)


@pytest.fixture(scope="session")
def pets(tmp_path_factory) -> str:
    """Two classes of pictures that are wider than high; a note and a hidden file beside them."""
    folder = tmp_path_factory.mktemp("pets")
    for name in ("cats", "dogs"):
        write_pictures(folder / name)
    (folder / "cats" / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_text("not one either")
    return str(folder)


def small(pets: str, vae: str, **more) -> ClassConditionalTask:
    torch.manual_seed(0)
    return ClassConditionalTask(
        ClassConditionalData(
            **{"backbone": "DiT", "sizes": SIZES, "folder": pets, "size": [32, 48], "vae": vae, **more}
        )
    )


def step(task, out: Path, config: LoopConfig = ONE_STEP) -> Path:
    """The export of a short run."""
    task.sheet = lambda: None
    task.validate = lambda: {}
    before = {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}
    Loop(task, config, out).run()
    assert any(not torch.equal(p, before[n]) for n, p in task.named_parameters() if n in before), "no weight moved"
    assert json.loads((out / "export" / "card.json").read_text())["steps"] == config.steps
    return out / "export"


def make(kind: str, pets: str, vae: str) -> Task:
    """A small task of each kind on the same pictures, with the chance that it has: noise, dropped labels, dropout."""
    if kind in ("DiT", "DiffiT"):
        return small(pets, vae, backbone=kind)
    torch.manual_seed(0)
    if kind == "ViT":
        return ClassifyTask(ClassifyData(folder=pets, size=[32, 48], sizes={**VIT, "dropout": 0.3}, flip=True))
    return PixelTask(PixelData(folder=pets, size=[16, 24], sizes=PIXELS))


def kill(kind: str, pets: str, vae: str, out: Path) -> None:
    """Trains until the fourth batch is made, then dies without a word."""
    task = make(kind, pets, vae)
    task.validate, task.sheet, seen, batch = dict, lambda: None, [], task.batch

    def killing(rng, size):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(rng, size)

    task.batch = killing
    Loop(task, RUN, out / kind).run()
