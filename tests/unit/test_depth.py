"""data/depth.py against transformers' own pipeline, on a random network."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from condit.data.depth import MODEL, depth, load


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    from transformers import Dinov2Config, DPTImageProcessorPil
    from transformers.models.depth_anything import DepthAnythingConfig, DepthAnythingForDepthEstimation

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],  # type: ignore[call-arg]
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
        head_hidden_size=4,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth")
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p).abs())
    model.save_pretrained(folder)
    size = {"height": 42, "width": 42}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def photo() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((70, 50))


def test_a_map_equals_that_of_transformers_pipeline(network):
    from transformers import DPTImageProcessorPil, pipeline
    from transformers.models.depth_anything import DepthAnythingForDepthEstimation

    model = DepthAnythingForDepthEstimation.from_pretrained(network)
    theirs = pipeline("depth-estimation", model=model, image_processor=DPTImageProcessorPil.from_pretrained(network))
    expected = np.asarray(theirs(photo())["depth"])
    actual = depth(photo(), network)
    assert actual.mode == "RGB" and actual.size == (70, 50)
    pixels = np.asarray(actual)
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) > 20
    assert np.array_equal(pixels[:, :, 0], expected) and np.array_equal(pixels[:, :, 1], expected)


def test_the_network_is_found_in_the_models_folder(network, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / MODEL.split("/")[1]).symlink_to(network)
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    assert np.array_equal(np.asarray(depth(photo())), np.asarray(depth(photo(), network)))


def test_a_network_is_read_once_and_another_takes_its_place(network, tmp_path, monkeypatch):
    from transformers.models.auto.modeling_auto import AutoModelForDepthEstimation

    other, read = tmp_path / "other", []
    shutil.copytree(network, other)
    whole = AutoModelForDepthEstimation.from_pretrained
    monkeypatch.setattr(
        AutoModelForDepthEstimation, "from_pretrained", lambda place, **how: read.append(place) or whole(place, **how)
    )
    load.cache_clear()
    first, again = depth(photo(), network), depth(photo(), network)
    assert read == [network] and np.array_equal(np.asarray(first), np.asarray(again))
    depth(photo(), other)
    assert read == [network, other]


def test_without_weights_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"no depth network at.*download {MODEL}.*annotate=False"):
        depth(photo(), tmp_path / "nothing")
