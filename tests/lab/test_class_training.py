"""Training of DiT, DiffiT and ViT on the committed icons and on folders: a step, its export, resume, clear errors."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from condit.diffusion.edm import EDM, edm_path, heun, precondition
from condit.diffusion.steps import by_timestep
from condit.encoders.vae import PatchAutoencoder, PatchAutoencoderConfig, decode_latents
from condit.training import latent_cache
from condit.training.class_conditional import ClassConditionalData, ClassConditionalTask
from condit.training.classify import ClassifyData, ClassifyTask
from condit.training.labelled import from_folder
from condit.training.loop import Loop, LoopConfig, Task
from condit.training.pixels import PixelData, PixelTask
from condit.weights import catalog
from condit.weights.diffit import load_diffit, load_diffit_image
from condit.weights.dit import load_dit
from condit.weights.files import read_tensors, save_tensors
from condit.weights.folders import WEIGHTS
from condit.weights.vae import load_vae
from condit.weights.vit import load_vit
from condit_lab.suites.class_claims import class_claims
from condit_lab.suites.classes import (
    ACCURACY,
    AGREEMENT,
    CLIP,
    CONCEPT,
    CONCEPT5,
    DISTANCE,
    ERROR,
    card_of,
    evaluate_classes,
)
from condit_lab.training.ship import copy_part
from few_icons import few_icons

ICONS = few_icons()
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


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return write_vae(tmp_path_factory.mktemp("vae"), 4)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> dict[str, str]:
    """A latent of 8 x 8 for icons, and a cache that the tests share."""
    folder = tmp_path_factory.mktemp("coarse")
    return {"vae": write_vae(folder / "vae", 16), "cache": str(folder / "cache")}


@pytest.mark.parametrize(
    "backbone, more", [("DiT", {"checkpointing": True}), ("DiT", {"adaln": "plain"}), ("DiffiT", {})], ids=str
)
def test_a_backbone_trains_a_step_on_icons_and_its_export_loads_strictly(backbone, more, tmp_path, coarse):
    task = ClassConditionalTask(
        ClassConditionalData(backbone=backbone, sizes=SIZES, icons=ICONS, label="style", flip=False, **coarse, **more)
    )
    folder = step(task, tmp_path) / "transformer"
    network = load_diffit(folder / WEIGHTS) if backbone == "DiffiT" else load_dit(folder / WEIGHTS)
    assert network.config == task.network.config
    if backbone == "DiT":
        assert load_dit(folder).config.latent == (8, 8)
        assert load_dit(folder).config.gates == (more.get("adaln") != "plain")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, task.network.null_label])
    assert torch.equal(network(x, t, y), task.network.eval()(x, t, y))
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert [names[str(i)] for i in range(len(names))] == task.classes
    assert "twemoji" in task.classes
    assert "streamline-emojis" not in task.classes  # the style that nobody trains on


def test_an_embedded_class_model_is_halved_to_ship_and_draws_by_name(tmp_path, monkeypatch):
    task = ClassConditionalTask(
        ClassConditionalData(
            backbone="DiT", sizes=SIZES, icons=ICONS, label="style", flip=False, vae="tiny", predicts="x0"
        )
    )
    copy_part(step(task, tmp_path / "run"), tmp_path / "dit", half=True)
    tensors = read_tensors(tmp_path / "dit" / "transformer" / WEIGHTS).values()
    assert all(x.dtype is not torch.float32 for x in tensors)
    monkeypatch.setitem(catalog.MODELS, "small-dit", catalog.Entry("model", "random", "none", tmp_path / "dit"))
    pipe = condit.load("small-dit")
    assert next(pipe.backbone.parameters()).dtype is torch.float32
    (picture,) = pipe("twemoji", seed=0, num_inference_steps=2).images
    assert picture.size == (128, 128)
    (tmp_path / "cards.json").write_text(json.dumps({"dit": {"steps": 7}}))
    assert card_of("small-dit") == {"steps": 7} and card_of(str(tmp_path / "nowhere")) == {}


def test_exported_class_models_are_compared_on_the_same_icons(tmp_path, coarse):
    given = {"icons": ICONS, "label": "style", "flip": False, "sizes": SIZES, **coarse}
    folders = [
        step(ClassConditionalTask(ClassConditionalData(backbone=backbone, **given)), tmp_path / backbone)
        for backbone in ("DiT", "DiffiT")
    ]
    folders.append(step(ClassifyTask(ClassifyData(icons=ICONS, label="style", sizes=VIT)), tmp_path / "ViT"))
    folders.append(step(ClassifyTask(ClassifyData(icons=ICONS, label="base", sizes=VIT)), tmp_path / "concepts"))
    told: list[str] = []
    found = evaluate_classes(folders, tmp_path / "out", data=ICONS, vae=coarse["vae"], count=16, tell=told.append)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == found
    figures = {(f["model"], f["measure"]): f for f in found["figures"]}
    for name in ("DiT", "DiffiT"):
        for measure in (ERROR, AGREEMENT, DISTANCE):
            interval = figures[name, measure]["interval"]
            assert interval["low"] <= interval["value"] <= interval["high"]
    # The difference is of the same icons: its middle is that of the means.
    one, other = (figures[name, ERROR] for name in ("DiT", "DiffiT"))
    expected = other["interval"]["value"] - one["interval"]["value"]
    assert one["less"] is None and other["less"]["value"] == pytest.approx(expected)
    untrained, judge = (figures[name, ACCURACY]["interval"]["value"] for name in ("ViT", "the judge, a CNN"))
    assert 0 <= untrained < judge
    for who in ("concepts", CLIP):
        first, five = (figures[who, measure]["interval"] for measure in (CONCEPT, CONCEPT5))
        assert 0 <= first["value"] <= five["value"] <= 100 and first["n"] == five["n"] > 0
    assert (
        figures[CLIP, CONCEPT5]["interval"]["value"] > figures["concepts", CONCEPT5]["interval"]["value"]
    )  # untrained
    claims = class_claims(found)
    assert claims.keys() == {"diffit-dit", "vit-style", "vit-concept"}
    assert f"{found['models']['DiffiT']['parameters']:,}" in claims["diffit-dit"]
    assert found["models"]["DiT"]["steps"] == 1 and found["models"]["DiT"]["parameters"] > 1000
    assert Image.open(tmp_path / "out" / "classes.png").width > 200
    # Again, the same figures.
    again = evaluate_classes(folders[:1], tmp_path / "again", data=ICONS, vae=coarse["vae"], count=16)
    assert again["figures"][0]["interval"] == one["interval"]
    with pytest.raises(ValueError, match="no style of the icon world"):
        of_groups = step(ClassifyTask(ClassifyData(icons=ICONS, label="group", sizes=VIT)), tmp_path / "groups")
        evaluate_classes([folders[0], of_groups], tmp_path / "bad", data=ICONS, vae=coarse["vae"], count=16)


def test_dit_and_diffit_are_given_the_same_batches(pets, vae):
    tasks = [small(pets, vae, backbone=name) for name in ("DiT", "DiffiT")]
    first, second = (task.batch(random.Random(3), 5) for task in tasks)
    assert torch.equal(first.x0, second.x0)
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("backbone", ["DiT", "DiffiT"])
def test_a_rectangular_folder_of_classes_trains_and_is_judged_repeatably(backbone, tmp_path, pets, vae):
    task = small(pets, vae, backbone=backbone)
    assert task.classes == ["cats", "dogs"]
    assert len(task.latents) + len(task.held_out) == 28
    assert task.network.config.input_size == (8, 12)
    torch.nn.init.normal_(task.network.final_layer.linear.weight, std=0.1)
    if backbone == "DiT":
        torch.nn.init.normal_(task.network.get_parameter("final_layer.adaLN_modulation.1.weight"), std=0.1)
    with torch.no_grad():
        figures = task.validate()
        assert figures == task.validate()
    assert figures["n"] == len(task.held_out) > 0
    assert figures["wrong_class"] != 0
    assert task.sheet().size[0] > 300
    folder = step(task, tmp_path) / "transformer"
    read = {"DiT": load_dit, "DiffiT": load_diffit}[backbone]
    config = read(folder / WEIGHTS).config
    assert (config.latent, config.num_classes) == ((8, 12), 2)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "cats", "1": "dogs"}
    if backbone == "DiT":
        assert load_dit(folder).config.latent == (8, 12)  # by diffusers' names, of which sample_size is a list here
    pipe = condit.load(folder.parent, vae=vae)
    assert pipe("dogs", num_inference_steps=2, seed=0).images[0].size == (48, 32)


@pytest.mark.parametrize("backbone", ["DiT", "DiffiT"])
def test_a_flat_folder_trains_an_unconditional_network(backbone, tmp_path, vae):
    folder = write_pictures(tmp_path / "flat", count=6, size=(32, 32))
    task = ClassConditionalTask(
        ClassConditionalData(backbone=backbone, sizes=SIZES, folder=str(folder), size=32, vae=vae)
    )
    assert task.network.config.num_classes == 0
    assert len(task.generate([0, 0])) == 2
    out = step(task, tmp_path / "run")
    assert condit.load(out, vae=vae)(num_inference_steps=2, seed=0).images[0].size == (32, 32)
    read = {"DiT": load_dit, "DiffiT": load_diffit}[backbone]
    network = read(out / "transformer" / WEIGHTS)
    assert network(torch.zeros(1, 4, 8, 8), torch.tensor([5])).shape == (1, 8, 8, 8)


def test_a_diffusers_autoencoder_is_sampled_and_scaled(tmp_path, pets):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    kl = AutoencoderKL(
        block_out_channels=(8, 8),  # type: ignore[arg-type]
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
    ).eval()
    kl.save_pretrained(tmp_path)
    task = small(pets, str(tmp_path), flip=False)
    pictures = from_folder(pets, (32, 48)).train
    posterior = kl.encode(pictures.read([0])).latent_dist  # type: ignore[union-attr]
    torch.testing.assert_close(task.latents.mean([0]), 0.18215 * posterior.mean, atol=1e-3, rtol=1e-3)  # kept in fp16
    draws = torch.cat([task.latents.sample([0], [0], torch.Generator().manual_seed(s)) for s in range(256)])
    torch.testing.assert_close(draws.std(0), 0.18215 * posterior.std[0], atol=0, rtol=0.25)  # of 256 draws, 6 sigma
    torch.testing.assert_close(
        decode_latents(task.vae, task.latents.mean([0])),
        kl.decode(posterior.mean).sample.clamp(-1, 1),  # type: ignore[union-attr]
        atol=5e-3,
        rtol=0,
    )


def test_latents_come_from_the_cache_until_a_picture_changes(tmp_path, vae, monkeypatch):
    folder = write_pictures(tmp_path / "flat", count=5, size=(32, 32))
    made = []
    fill = latent_cache.fill
    monkeypatch.setattr(latent_cache, "fill", lambda *given: made.append(1) or fill(*given))
    encoder = load_vae(vae)

    def encode() -> latent_cache.LatentSet:
        pictures = from_folder(folder, (32, 32)).train
        return latent_cache.encode(encoder, pictures, flip=True, cache=str(tmp_path / "cache"))

    first, again = encode(), encode()
    assert len(made) == 1
    assert np.array_equal(first.moments, again.moments)
    assert not np.array_equal(first.moments[:, 0], first.moments[:, 1])
    Image.new("RGB", (40, 40), "red").save(folder / "0.png")
    assert not np.array_equal(encode().moments, again.moments)
    assert len(made) == 2


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


KINDS = ("DiT", "DiffiT", "ViT", "pixels")
KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_class_training as here
for kind in here.KINDS:  # a fork each: importing torch once is enough
    child = os.fork()
    if not child:
        try:
            here.kill(kind, {pets!r}, {vae!r}, Path({out!r}))
        finally:
            os._exit(1)
    print(kind, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pets, vae) -> Path:
    """A folder with a run of every kind that was killed."""
    out = tmp_path_factory.mktemp("killed")
    script = KILLED.format(tests=str(Path(__file__).parent), pets=pets, vae=vae, out=str(out))
    # Threads decide the order of sums.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, env=environment)
    assert ended.stdout.split() == [word for kind in KINDS for word in (kind, str(-signal.SIGKILL))], ended.stderr
    return out


def assert_same_end(one: Path, other: Path) -> None:
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one, other)]
    for kind in ("parameters", "average"):
        assert all(torch.equal(value, states[1][kind][name]) for name, value in states[0][kind].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_ends_as_one_never_stopped(kind, tmp_path, killed, pets, vae):
    step(make(kind, pets, vae), tmp_path / "whole", RUN)
    resumed = Loop(make(kind, pets, vae), RUN, killed / kind)
    assert 0 < resumed.step < RUN.steps
    step(resumed.task, killed / kind, RUN)
    assert_same_end(tmp_path / "whole", killed / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_nan_is_skipped_and_moves_no_weight(kind, tmp_path, pets, vae):
    task = make(kind, pets, vae)
    forward = task.forward

    def bad(batch, generator):
        loss, logs = forward(batch, generator)
        return loss * float("nan"), logs

    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    loop = Loop(task, ONE_STEP, tmp_path)
    task.forward = bad
    batch = task.batch(random.Random(0), 4)
    loop.train_step([batch])
    assert loop.bad_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())
    task.forward = forward
    loop.train_step([batch])
    assert loop.bad_steps == 0
    assert any(not torch.equal(p, before[name]) for name, p in task.named_parameters())


def test_a_vit_trains_a_step_on_icons_and_loads_and_starts_another(tmp_path, pets):
    task = ClassifyTask(ClassifyData(icons=ICONS, label="base", sizes=VIT))
    assert "red apple" in task.classes
    folder = step(task, tmp_path)
    network = load_vit(folder)
    images = torch.randn(2, 3, 128, 128)
    assert torch.equal(network(images), task.network.eval()(images))
    names = json.loads((folder / "config.json").read_text())["id2label"]
    assert [names[str(i)] for i in range(len(names))] == task.classes
    other = ClassifyTask(ClassifyData(folder=pets, size=[32, 48], init=str(folder)))
    assert torch.equal(*(net.get_parameter("blocks.1.mlp.fc1.weight") for net in (other.network, network)))
    assert other.network(torch.zeros(1, 3, 32, 48)).shape == (1, 2)


def test_a_vit_is_judged_on_every_held_out_picture(pets):
    task = ClassifyTask(ClassifyData(folder=pets, size=[32, 48], sizes=VIT))
    task.eval()
    with torch.no_grad():
        head = task.network.head
        assert head is not None
        head.bias[1] = 5.0  # it says "dogs" whatever it sees
        figures = task.validate()
    assert figures["n"] == len(task.held_labels) > 0
    assert figures["accuracy"] == pytest.approx(100 * float(task.held_labels.float().mean()), abs=1e-3)
    assert task.sheet().size[0] > 300


def test_augmentation_moves_every_picture_and_none_when_it_is_off():
    from condit.training.classify import augment

    images = torch.rand(3, 3, 16, 24) * 2 - 1
    still = augment(images, random.Random(0), shift=0, zoom=0, flip=False)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)  # bilinear weights of 1 and 1e-7
    moved = augment(images, random.Random(0), shift=0.1, zoom=0.2, flip=True)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(moved, images, strict=True))
    assert torch.equal(moved, augment(images, random.Random(0), shift=0.1, zoom=0.2, flip=True))


SHARED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_class_training as here
task = here.make({kind!r}, {pets!r}, {vae!r})
loop = here.Loop(task, here.RUN.model_copy(update={{"shard": True}}), Path({out!r}))
assert loop.accelerator.num_processes == 2
assert all(p.to_local().numel() < p.numel() for p in loop.parameters.values() if p.shape[0] > 1)
loop.run()
"""


@pytest.mark.parametrize("kind", ["DiT", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_two_processes_share_the_weights_of_a_network_and_its_export_loads(kind, tmp_path, pets, vae, two_processes):
    script = SHARED.format(tests=str(Path(__file__).parent), kind=kind, pets=pets, vae=vae, out=str(tmp_path))
    two_processes(script)
    assert json.loads((tmp_path / "export" / "card.json").read_text())["images_seen"] == 2 * RUN.steps * RUN.batch
    resumed = Loop(make(kind, pets, vae), RUN, tmp_path)  # one process takes the checkpoint
    assert resumed.step == RUN.steps
    pipe = condit.load(tmp_path / "export", **({"vae": vae} if "Di" in kind else {}))
    network = pipe.model if kind == "ViT" else pipe.backbone
    with resumed.averaged():
        averaged = {name: p.detach().clone() for name, p in resumed.task.get_submodule("network").named_parameters()}
    assert all(torch.equal(p, averaged[name]) for name, p in network.named_parameters())


# Pixels


@pytest.mark.parametrize("icons", [True, False])
def test_a_u_shape_trains_a_step_on_pixels_and_its_export_draws(icons, tmp_path, pets):
    source = {"icons": ICONS, "size": 32} if icons else {"folder": pets, "size": [16, 24]}
    task = PixelTask(PixelData(sizes=PIXELS, edm={"sigma_max": 20.0}, **source))
    with torch.no_grad():
        fresh = task.eval().validate()
        assert fresh == task.validate() and fresh["n"] == len(task.held_images) > 0
    folder = step(task.train(), tmp_path, ONE_STEP.model_copy(update={"steps": 3, "lr": 1e-2}))
    pipe = condit.load(folder)
    assert (pipe.parts.size, pipe.parts.edm.sigma_max) == (task.size, 20.0)
    found = pipe(num_images_per_prompt=2, num_inference_steps=3, seed=5, output_type="pt")
    assert found.images.shape == (2, 3, *task.size) and found.seeds == [5, 6]
    # The sampler by hand, of the second picture alone.
    noise = torch.randn(3, *task.size, generator=torch.Generator().manual_seed(6))[None]
    edm, network = EDM(sigma_max=20.0), load_diffit_image(folder / WEIGHTS)
    with torch.no_grad():
        alone = heun(by_timestep(precondition(network, edm)), 20.0 * noise, edm_path(3, edm)).clamp(-1, 1)
    torch.testing.assert_close(found.images[1:], alone, rtol=0, atol=1e-4)  # a row of a batch
    again = pipe(latents=noise, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(again, alone, rtol=0, atol=1e-6)
    assert pipe(num_inference_steps=2, seed=0, height=16, width=16).images[0].size == (16, 16)
    seen = []
    pipe(num_inference_steps=3, callback_on_step_end=lambda pipe, i, sigma, state: seen.append((i, round(sigma, 3))))
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] == 20.0


def test_mistakes_with_pixels_are_told(tmp_path, pets):
    for match, more in (
        ("No backbone 'UNet' for pixels", {"backbone": "UNet"}),
        ("must be multiples of 8", {"size": 12}),
        ("equally many resolutions", {"sizes": {**PIXELS, "blocks": [1]}}),
        ("3 channels", {"sizes": {**PIXELS, "in_channels": 4}}),
        ("sizes.window must have the type of 8; found 'wide'", {"sizes": {**PIXELS, "window": "wide"}}),
        ("sigma_max above", {"edm": {"sigma_max": 0.0}}),
    ):
        with pytest.raises(ValueError, match=match):
            PixelTask(PixelData(**{"folder": pets, "size": 16, "sizes": PIXELS, **more}))
    with pytest.raises(ValueError, match="sizes.widht is not a field of DiffiTImageConfig"):
        PixelTask(PixelData(folder=pets, sizes={"widht": 3}))
    pipe = condit.load(step(PixelTask(PixelData(folder=pets, size=16, sizes=PIXELS)), tmp_path))
    for match, more in (
        ("has no class 'fox'", {"label": "fox"}),
        ("multiples of 8", {"height": 20}),
        ("2 to", {"num_inference_steps": 1}),
        ("output_type must be 'pil' or 'pt'", {"output_type": "latent"}),
        ("noise of shape", {"latents": torch.zeros(1, 3, 8, 8)}),
    ):
        with pytest.raises(ValueError, match=match):
            pipe(**more)
    with pytest.raises(ValueError, match="vae= is for DiT and DiffiT"):
        condit.load(tmp_path / "export", vae="tiny")
    pipe.backbone.head[1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pipe(num_inference_steps=2)


def test_mistakes_in_the_pictures_are_told_by_name(tmp_path, vae):
    def fails(match: str, **more) -> None:
        with pytest.raises(ValueError, match=match):
            small(str(tmp_path / "p"), vae, **more)

    fails("No folder")
    (tmp_path / "p").mkdir()
    fails("hold no image")
    write_pictures(tmp_path / "p" / "cats", count=2)
    (tmp_path / "p" / "dogs").mkdir()
    fails("dogs holds no image")
    file = tmp_path / "p" / "dogs" / "small.png"
    Image.new("RGB", (20, 10)).save(file)
    fails("small.png is 20 x 10 pixels")
    file.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    fails("small.png is")
    file.unlink()
    (file.parent / "rex.png").write_bytes((tmp_path / "p" / "cats" / "0.png").read_bytes())
    (tmp_path / "p" / "loose.png").write_bytes((tmp_path / "p" / "cats" / "0.png").read_bytes())
    fails("both images .* and subfolders")


def test_mistakes_in_a_recipe_are_told(tmp_path, pets, vae):
    def fails(match: str, **more) -> None:
        with pytest.raises(ValueError, match=match):
            small(**{"pets": pets, "vae": vae, **more})

    fails("Set one of the two", icons=ICONS)
    fails(r"label\n.*'style', 'base' or 'group'", folder=None, icons=ICONS, label="colour")
    fails("No backbone 'UNet'", backbone="UNet")
    fails("patches of 5 do not divide", sizes={**SIZES, "patch_size": 5})
    fails("not a multiple of 4", size=[30, 48])
    fails("multiple of num_heads", sizes={**SIZES, "num_heads": 5})
    fails("follows from the data", sizes={**SIZES, "num_classes": 7})
    fails("sizes.widht is not a field of DiTConfig", sizes={**SIZES, "widht": 7})
    fails("for DiT only", backbone="DiffiT", adaln="plain")
    fails("predicts = 'x0'", sizes={**SIZES, "patch_size": 4})
    fails("no config.json", vae=str(tmp_path))
    fails("size is a side", size=[32, 48, 3])
    fails(r"predicts\n.*'noise' or 'x0'", predicts="v")
    fails("sizes.hidden_size must have the type of 1152; found '32'", sizes={**SIZES, "hidden_size": "32"})
    broken = write_vae(tmp_path / "broken", 4, scaling_factor=float("nan"))
    fails("NaN .* for cats/", vae=broken)
    with pytest.raises(ValueError, match="at least 2 classes"):
        ClassifyTask(ClassifyData(folder=str(Path(pets) / "cats"), size=32, sizes=VIT))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        ClassifyTask(ClassifyData(folder=pets, size=40, sizes=VIT))
    for wrong in ({"smoothing": 2.0}, {"shift": -0.1}, {"zoom": float("inf")}, {"flip": 1}, {"label": "colour"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"(?m)^{name}$"):
            ClassifyTask(ClassifyData.model_validate({"folder": pets, "size": 32, "sizes": VIT, **wrong}))
    with pytest.raises(ValueError, match="sizes.depth must have the type of 12; found 2.0"):
        ClassifyTask(ClassifyData(folder=pets, size=32, sizes={**VIT, "depth": 2.0}))
