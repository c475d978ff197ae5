"""backbones/diffit_image.py: the U-shape in image space."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from condit.backbones.diffit import DiffiTContext
from condit.backbones.diffit_image import (
    IMAGE_PRESETS,
    DiffiTImage,
    DiffiTImageConfig,
    from_windows,
    noise_features,
    to_windows,
)
from diffit_models import Double, close, randomised

IMAGE = DiffiTImageConfig(
    blocks=(1, 2), widths=(8, 16), window=4, time_dim=12, time_features=8, head_dim=4, dropout=0.0
)


@pytest.fixture
def image_model() -> DiffiTImage:
    model = DiffiTImage(IMAGE)
    randomised(model)
    return model


def images(*size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)), torch.tensor([-1.5, 0.7])


@pytest.mark.parametrize(
    ("preset", "millions", "side", "levels"),
    [
        ("DiffiT-FFHQ-64", 44.8, 64, 4),
        ("DiffiT-FFHQ-64-I1", 23.8, 64, 4),
        ("DiffiT-CIFAR-10", 28.7, 32, 3),
        ("DiffiT-CIFAR-10-I1", 15.9, 32, 3),
    ],
)
def test_parameters_of_the_u_shapes(preset, millions, side, levels):
    """The paper gives no counts: these follow from its tables and from our choices."""
    with torch.device("meta"):
        model = DiffiTImage(IMAGE_PRESETS[preset])
        out = model(torch.empty(1, 3, side, side), torch.empty(1))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert out.shape == (1, 3, side, side)
    assert len(model.encoder) == levels and len(model.decoder) == levels - 1


def test_every_u_shape_is_among_the_counted():
    assert len(IMAGE_PRESETS) == 4


def test_windows_are_read_row_by_row_and_put_back():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    windows = to_windows(x, 2)
    assert windows.shape == (2, 6, 4, 3)
    assert torch.equal(windows[1, 4], x[1, :, 2:4, 2:4].flatten(1).T)
    assert torch.equal(from_windows(windows, 2, 4), x)


def test_a_window_attends_to_itself_alone(image_model):
    block = image_model.encoder[0].blocks[0]
    context = DiffiTContext(torch.randn(2, 12), (4, 4))
    x = torch.randn(2, 4, 16, 8)
    y = x.clone()
    y[:, 3] += 1
    with torch.no_grad():
        same = (block.block(x, context) - block.block(y, context)).abs().amax((0, 2, 3))
    assert same[:3].max() == 0 < same[3]


def test_noise_features_are_sines_first_and_end_at_one_ten_thousandth():
    actual = noise_features(torch.tensor([2.0]), 4)
    close(
        actual,
        torch.tensor([[2.0, 2e-4, 0, 0]]).sin() + torch.tensor([[0, 0, 2.0, 2e-4]]).cos() * torch.tensor([0, 0, 1, 1]),
    )


def test_a_fresh_u_shape_puts_out_zero():
    assert torch.equal(DiffiTImage(IMAGE)(*images(8, 8)), torch.zeros(2, 3, 8, 8))


def test_a_rectangular_image_comes_back_in_its_shape(image_model):
    assert image_model(*images(8, 24)).shape == (2, 3, 8, 24)


def test_noise_level_and_every_weight_matter_in_the_u_shape(image_model):
    x, c = images(8, 16)
    with torch.no_grad():
        assert (image_model(x, c) - image_model(x, c + 1)).abs().max() > 1e-3
    image_model(x, c).square().mean().backward()
    assert [n for n, p in image_model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_only():
    model = DiffiTImage(replace(IMAGE, dropout=0.5))
    randomised(model)
    x, c = images(8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, c), model(x, c))
        model.train()
        assert not torch.equal(model(x, c), model(x, c))


def test_the_u_shape_compiles_to_one_graph(image_model):
    x, c = images(8, 16)
    compiled = torch.compile(image_model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        close(compiled(x, c), image_model(x, c))


def test_controls_see_every_site_of_the_u_shape(image_model):
    control = Double("decoder.0.blocks.0.block.attn")
    x, c = images(8, 16)
    with torch.no_grad():
        assert (image_model(x, c, controls=[control]) - image_model(x, c)).abs().max() > 1e-4
    assert [path for path, *_ in control.seen] == [site.path for site in image_model.sites]
    assert [site.index for site in image_model.sites] == list(range(4))
    modules = dict(image_model.named_modules())
    assert all(modules[site.path].site == site for site in image_model.sites)  # type: ignore[union-attr]


def test_an_image_that_does_not_divide_into_windows_raises(image_model):
    with pytest.raises(ValueError, match=r"multiples of 8 are expected.*found \(2, 3, 12, 8\)"):
        image_model(torch.zeros(2, 3, 12, 8), torch.zeros(2))


@pytest.mark.parametrize("wrong", [{"blocks": (1, 1, 1)}, {"head_dim": 3}])
def test_a_u_shape_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match="widths"):
        replace(IMAGE, **wrong)


def test_checkpointing_the_u_shape_changes_no_gradient_with_dropout():
    model = randomised(DiffiTImage(replace(IMAGE, dropout=0.3))).train()
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        out = model(*images(16, 16), generator=torch.Generator().manual_seed(3), checkpointing=checkpointing)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
