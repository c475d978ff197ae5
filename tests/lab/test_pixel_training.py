"""Training of DiffiT in image space and of ViT, and their exports."""

import json
import random

import pytest
import torch
from PIL import Image

import condit
from class_tasks import ONE_STEP, PIXELS, VIT, step
from condit.diffusion.edm import EDM, edm_path, heun, precondition
from condit.diffusion.steps import by_timestep
from condit.training.classify import ClassifyData, ClassifyTask
from condit.training.pixels import PixelData, PixelTask
from condit.weights.diffit import load_diffit_image
from condit.weights.folders import WEIGHTS
from condit.weights.vit import load_vit
from few_icons import few_icons

ICONS = few_icons()


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


def test_a_vit_is_judged_on_every_held_out_image(pets):
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


def test_augmentation_moves_every_image_and_none_when_it_is_off():
    from condit.training.classify import augment

    images = torch.rand(3, 3, 16, 24) * 2 - 1
    still = augment(images, random.Random(0), shift=0, zoom=0, flip=False)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)  # bilinear weights of 1 and 1e-7
    moved = augment(images, random.Random(0), shift=0.1, zoom=0.2, flip=True)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(moved, images, strict=True))
    assert torch.equal(moved, augment(images, random.Random(0), shift=0.1, zoom=0.2, flip=True))


# Pixels


@pytest.mark.parametrize("icons", [True, False])
def test_a_u_shape_trains_a_step_on_pixels_and_its_export_generates(icons, tmp_path, pets):
    source = {"icons": ICONS, "size": 32} if icons else {"folder": pets, "size": [16, 24]}
    task = PixelTask(PixelData(sizes=PIXELS, edm={"sigma_max": 20.0}, **source))
    with torch.no_grad():
        fresh = task.eval().validate()
        assert fresh == task.validate() and fresh["n"] == len(task.held_images) > 0
    folder = step(task.train(), tmp_path, ONE_STEP.model_copy(update={"steps": 3, "lr": 1e-2}))
    pipe = condit.load(folder)
    assert (pipe.parts.size, pipe.parts.edm.sigma_max) == (task.size, 20.0)
    generated = pipe(num_images_per_prompt=2, num_inference_steps=3, seed=5, output_type="pt")
    assert generated.images.shape == (2, 3, *task.size) and generated.seeds == [5, 6]
    # The sampler by hand, of the second picture alone.
    noise = torch.randn(3, *task.size, generator=torch.Generator().manual_seed(6))[None]
    edm, network = EDM(sigma_max=20.0), load_diffit_image(folder / WEIGHTS)
    with torch.no_grad():
        alone = heun(by_timestep(precondition(network, edm)), 20.0 * noise, edm_path(3, edm)).clamp(-1, 1)
    torch.testing.assert_close(generated.images[1:], alone, rtol=0, atol=1e-4)  # a row of a batch
    again = pipe(latents=noise, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(again, alone, rtol=0, atol=1e-6)
    rest = edm_path(5, edm).since(3)  # image to image
    white = Image.new("RGB", (task.size[1], task.size[0]), "white")
    near = pipe(image=white, strength=0.4, num_inference_steps=5, seed=6, output_type="pt").images
    with torch.no_grad():
        wanted = heun(by_timestep(precondition(network, edm)), 1 + rest.sigmas[0] * noise, rest).clamp(-1, 1)
    torch.testing.assert_close(near, wanted, rtol=0, atol=1e-5)
    assert pipe(num_inference_steps=2, seed=0, height=16, width=16).images[0].size == (16, 16)
    seen = []
    pipe(num_inference_steps=3, callback_on_step_end=lambda pipe, i, sigma, state: seen.append((i, round(sigma, 3))))
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] == 20.0


def test_mistakes_with_pixels_raise(tmp_path, pets):
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
        ("output_type must be 'pil', 'pt' or 'np'", {"output_type": "latent"}),
        ("noise of shape", {"latents": torch.zeros(1, 3, 8, 8)}),
    ):
        with pytest.raises(ValueError, match=match):
            pipe(**more)
    with pytest.raises(ValueError, match="vae= is for Stable Diffusion, DiT and DiffiT"):
        condit.load(tmp_path / "export", vae="tiny")
    pipe.backbone.head[1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pipe(num_inference_steps=2)
