"""DiT4Edit's pieces against tensors of the code they come from (golden/dit4edit/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.pixart import PixArt, PixArtConfig
from condit.diffusion.inversion import ddim_path, dpm_path, invert, linear_cumprod, walk

GOLDEN = Path(__file__).parent / "golden" / "dit4edit"


def close(found: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1e-6))


# Inversion


@pytest.fixture(scope="module")
def inversion() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inversion.safetensors")


@pytest.fixture(scope="module")
def pixart() -> PixArt:
    fields = json.loads((GOLDEN / "inversion_config.json").read_text())["model"]
    config = PixArtConfig(**{k: v for k, v in fields.items() if k in PixArtConfig.__dataclass_fields__})
    network = PixArt(config).requires_grad_(False)
    network.load_state_dict(load_file(GOLDEN / "pixart_weights.safetensors"), strict=True)
    return network


def test_the_tiny_pixart_predicts_the_published_output(pixart, inversion):
    x0 = inversion["x0"]
    out = pixart(x0, torch.full((len(x0),), 500), inversion["caption"], inversion["caption_mask"])
    close(out, inversion["forward_t500"])


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("name", ["dpmpp2m", "dpmpp2m_sigma_min", "ddim"])
def test_every_state_of_inversion_and_sampling_is_reproduced(pixart, inversion, name, steps):
    cumprod = linear_cumprod()
    path = ddim_path(cumprod, steps) if name == "ddim" else dpm_path(cumprod, steps, to_zero=name == "dpmpp2m")
    asked = []

    def network(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        out = pixart(x, torch.full((len(x),), t), inversion["caption"], inversion["caption_mask"])
        return out[:, :4]  # the noise; the others are variance

    key = f"{name}.{steps}"
    up = invert(network, inversion["x0"], path, "entered" if name == "ddim" else "dpmpp2m")
    assert asked == inversion[f"{key}.invert_t"].tolist()
    for found, expected in zip(up.flip(0), inversion[f"{key}.invert"], strict=True):
        close(found, expected)
    asked.clear()
    down = walk(network, inversion[f"{key}.invert"][-1], path)
    assert asked == inversion[f"{key}.sample_t"].tolist()
    for found, expected in zip(down, inversion[f"{key}.sample"], strict=True):
        close(found, expected)
    if name != "ddim":
        close(torch.stack([path.ratio(i) for i in range(steps, -1, -1)]), inversion[f"{key}.invert_sigmas"])
        ends = [path.ratio(i, ending=True) for i in range(steps + 1)]
        close(torch.stack(ends), inversion[f"{key}.sample_sigmas"])
