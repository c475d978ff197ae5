"""Training of DiT and DiffiT on folders of classes: a step, its export, the cache of latents, clear errors."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from class_tasks import SIZES, VIT, small, step, write_pictures, write_vae
from condit.encoders.vae import decode_latents
from condit.training import latent_cache
from condit.training.class_conditional import ClassConditionalData, ClassConditionalTask
from condit.training.classify import ClassifyData, ClassifyTask
from condit.training.labelled import from_folder
from condit.weights.diffit import load_diffit
from condit.weights.dit import load_dit
from condit.weights.folders import WEIGHTS
from condit.weights.vae import load_vae
from few_icons import few_icons

ICONS = few_icons()


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


def test_latents_come_from_the_cache_until_an_image_changes(tmp_path, vae, monkeypatch):
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


def test_mistakes_in_the_images_raise_with_the_name_of_the_file(tmp_path, vae):
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


def test_mistakes_in_a_recipe_raise(tmp_path, pets, vae):
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
