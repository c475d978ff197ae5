"""suites/adain.py: the transfer by hand, the files in circulation, what is said where there are none."""

import pytest
import torch
from torch import nn

from condit.weights.files import save_tensors
from condit_lab.suites.adain import AdaIN, adain
from condit_lab.suites.style_methods import Stage, by_adain


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AdaIN().eval().requires_grad_(False)


def test_the_content_takes_the_styles_statistics():
    g = torch.Generator().manual_seed(0)
    content, style = torch.randn(2, 3, 8, 8, generator=g) * 2 + 1, torch.randn(2, 3, 6, 6, generator=g) * 5 - 3
    actual = adain(content, style)
    assert torch.allclose(actual.mean((2, 3)), style.mean((2, 3)), atol=1e-5)
    assert torch.allclose(actual.std((2, 3)), style.std((2, 3)), atol=1e-4)
    assert torch.allclose(adain(content, content), content, atol=1e-4)  # eps in the deviation


def test_the_layers_carry_the_published_numbers(model):
    convolutions = [f"{i}" for i, x in enumerate(model.encoder) if isinstance(x, nn.Conv2d)]
    assert convolutions == ["0", "2", "5", "9", "12", "16", "19", "22", "25", "29"]
    assert [f"{i}" for i, x in enumerate(model.decoder) if isinstance(x, nn.Conv2d)] == [
        *("1", "5", "8", "11", "14", "18", "21", "25", "28"),
    ]
    assert len(model.encoder) == 31  # up to relu4_1
    assert isinstance(model.decoder[-1], nn.Conv2d)


def test_strength_0_is_the_content_through_the_network_alone(model):
    g = torch.Generator().manual_seed(1)
    content, style, other = torch.rand(3, 1, 3, 32, 32, generator=g)
    assert model(content, style).shape == content.shape
    assert torch.equal(model(content, style, 0.0), model(content, other, 0.0))
    assert not torch.equal(model(content, style), model(content, other))


def test_both_files_are_known_by_their_tensors(model, tmp_path):
    encoder = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    encoder["32.weight"] = torch.zeros(1)  # the published file goes on to relu5_4
    save_tensors(tmp_path / "b.safetensors", encoder)
    torch.save(model.decoder.state_dict(), tmp_path / "a.pth")
    loaded = AdaIN.load(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert "+" in loaded.hash


def test_missing_weights_raise(model, tmp_path):
    with pytest.raises(ValueError, match="not shipped. Give their folder: --adain DIR"):
        AdaIN.load(None)
    with pytest.raises(ValueError, match="There is no folder"):
        AdaIN.load(tmp_path / "absent")
    torch.save(model.decoder.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"no encoder among \['a.pth'\]"):
        AdaIN.load(tmp_path)


def test_as_a_method_it_edits_the_images_generated_without_control(model):
    g = torch.Generator().manual_seed(2)
    blank, references, true = torch.randint(0, 256, (3, 2, 3, 32, 32), generator=g, dtype=torch.uint8)
    actual = by_adain(Stage(None, adain=model), blank, references, true, 1.0)
    expected = model(blank[1:].float() / 255, references[1:].float() / 255)
    assert actual.dtype == torch.uint8 and actual.shape == blank.shape
    assert torch.equal(actual[1:], (expected * 255).round().to(torch.uint8))
    with pytest.raises(ValueError, match="needs its weights"):
        by_adain(Stage(None), blank, references, true, 1.0)
