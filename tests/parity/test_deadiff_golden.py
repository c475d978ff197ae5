"""DEADiff against numbers of the released code (golden/deadiff/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.encoders.clip_patches import ClipPatches, resize_antialiased
from condit.encoders.qformer import QFormer, QFormerConfig
from condit.weights.deadiff import join, split

GOLDEN = Path(__file__).parent / "golden" / "deadiff"


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """The tolerance of the fixtures: relative to the largest value."""
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max() / expected.abs().max())
    assert worst <= relative, f"off by {worst:.2e} of the largest value"


def read(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


# The Q-Former


def published_qformer() -> dict[str, Tensor]:
    """The fixture's tensors as they stand in a full checkpoint."""

    def full(name: str) -> str:
        return name.replace("proj_layer.", "style_proj_layer.") if name.startswith("proj_layer") else f"style_blip.{name}"

    return {full(name): value for name, value in read("qformer_weights").items()}


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    config = json.loads((GOLDEN / "qformer_config.json").read_text())
    parts = split(published_qformer())
    tensors = {name.removeprefix("style."): value for name, value in parts.adapter.items()}
    found = QFormer(QFormerConfig.of(tensors, heads=config["heads"]))
    found.load_state_dict(tensors, strict=True)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> ClipPatches:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    c = json.loads((GOLDEN / "qformer_config.json").read_text())
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=c["vision_width"],
            intermediate_size=4 * c["vision_width"],
            num_hidden_layers=c["vision_layers"],
            num_attention_heads=c["vision_heads"],
            image_size=c["image_size"],
            patch_size=c["patch"],
        )
    )
    missing, unexpected = vision.load_state_dict(split(published_qformer()).tower, strict=False)
    assert all("post_layernorm" in name for name in missing) and not unexpected
    return ClipPatches(vision.eval().requires_grad_(False), blocks=c["vision_layers"])


def test_tower_and_norm_equal_the_released_ones(tower, qformer):
    io = read("qformer_io")
    close(qformer.ln_vision(tower.tokens(io["image"])), io["vision_features"])


@pytest.mark.parametrize("padded", ["", "_padded"])
def test_the_q_former_and_its_projection_equal_the_released_ones(tower, qformer, padded):
    io = read("qformer_io")
    tokens, ids, mask = tower.tokens(io["image"]), io[f"input_ids{padded}"], io[f"attention_mask{padded}"]
    states = qformer.read(tokens, ids, mask)
    if not padded:
        close(states, io["last_hidden"])
    close(states[:, : qformer.config.queries], io[f"multimodal_embeds{padded}"])
    close(qformer(tokens, ids, mask), io[f"ctx_tokens{padded}"])


def test_queries_alone_equal_the_released_ones(tower, qformer):
    io = read("qformer_io")
    close(qformer.read(tower.tokens(io["image"])), io["queries_without_text"])


def test_published_names_come_back_bit_by_bit():
    published = published_qformer()
    back = join(split(published))
    twin = {n.replace("style_blip", "content_blip"): v for n, v in published.items() if ".visual_encoder." in n}
    assert back.keys() == {*published, *twin}
    assert all(torch.equal(back[name], value) for name, value in (published | twin).items())


# Preparation of references


@pytest.mark.parametrize("name", ["preprocess", "preprocess_down"])
def test_references_are_prepared_as_by_the_released_code(tower, name):
    fixture = read(name)
    patches = ClipPatches(tower.tower, blocks=2)
    patches.size = 224
    for i in range(len(fixture) // 2):
        close(patches.prepare(fixture[f"in{i}"]), fixture[f"out{i}"])


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (224, 500), (226, 224)])
def test_the_antialias_blurs_both_axes_as_soon_as_one_shrinks(size):
    """By hand, in float64: the same kernel and border rule written as one dense two-dimensional sum."""
    images = torch.rand(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernels = []
    for side in size:
        sigma = max((side / 224 - 1) / 2, 0.001)
        width = int(max(4 * sigma, 3))
        width += width % 2 == 0
        weights = torch.tensor([pow(2.718281828459045, -((i - width // 2) ** 2) / (2 * sigma**2)) for i in range(width)])
        kernels.append((weights / weights.sum()).double())
    dense = torch.outer(*kernels)[None, None].expand(2, 1, -1, -1)
    margin = [len(k) // 2 for k in kernels]
    padded = torch.nn.functional.pad(images, (margin[1], margin[1], margin[0], margin[0]), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, dense, groups=2)
    expected = torch.nn.functional.interpolate(blurred, size=(224, 224), mode="bicubic", align_corners=True)
    torch.testing.assert_close(resize_antialiased(images, (224, 224)), expected, rtol=0, atol=1e-6)
