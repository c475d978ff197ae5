"""classifier.py: ViT as a classifier, its features, and the preprocessing of each publisher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import condit
from class_models import NAMES, VIT, randomise
from condit.backbones.vit import FLAVOURS, ViT, ViTConfig
from condit.drawing.classifier import ViTPipeline, prepare
from condit.weights.class_models import Preprocess, read_preprocess
from condit.weights.vit import save_vit


def write_vit(folder: Path, layout: Any = "transformers", config: ViTConfig = VIT) -> Path:
    config = replace(config, flavour=FLAVOURS["jax" if layout == "npz" else layout])
    model = ViT(config)
    randomise(model)
    name = {"npz": "vit.npz", "timm": "vit.safetensors", "transformers": "vit"}[layout]
    return save_vit(folder / name, config, model.state_dict(), layout=layout)


@pytest.fixture
def vit(tmp_path) -> ViTPipeline:
    folder = write_vit(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(NAMES)}
    (folder / "config.json").write_text(json.dumps(config))
    return condit.load(folder)


def test_classes_are_those_of_the_logits_under_the_names_of_the_folder(vit, pictures):
    images = pictures(2)
    with torch.no_grad():
        expected = vit.model(vit.preprocess(images)).softmax(-1)
    actual = vit.classify(images, top_k=3)
    assert [len(row) for row in actual] == [3, 3]
    for row, probabilities in zip(actual, expected, strict=True):
        assert [p.index for p in row] == probabilities.topk(3).indices.tolist()
        assert [p.label for p in row] == [NAMES[p.index] for p in row]
        assert [p.probability for p in row] == probabilities.topk(3).values.tolist()
    assert vit.classify(images[0], top_k=99) == vit.classify([images[0]]) and len(vit.classify(images[0])[0]) == 5


def test_features_are_the_tokens_of_the_model(vit, pictures):
    actual = vit.features(pictures(2))
    assert actual.patches.shape == (2, 16, 24) and actual.cls is not None and actual.cls.shape == (2, 24)
    with torch.no_grad():
        assert torch.equal(actual.cls, vit.model.features(vit.preprocess(pictures(2))).cls)


def test_placeholder_names_count_as_none_and_a_thousand_classes_as_imagenet(tmp_path, pictures):
    bare = condit.load(write_vit(tmp_path / "a"))
    assert bare.labels is None and bare.classify(pictures(1))[0][0].label.isdecimal()
    named = condit.load(write_vit(tmp_path / "b", config=replace(VIT, classes=1000)))
    assert named.label(207) == "golden retriever"


@pytest.mark.parametrize("layout", ["npz", "timm"])
def test_other_layouts_are_recognised_too(layout, tmp_path, pictures, monkeypatch):
    path = write_vit(tmp_path, layout)
    assert len(condit.load(path).classify(pictures(1))[0]) == 5
    if layout == "npz":
        monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
        (tmp_path / "models").mkdir()
        path.rename(tmp_path / "models" / "ViT-B_16.npz")
        assert isinstance(condit.load("vit-b-16"), ViTPipeline)


def test_a_headless_vit_gives_features_only(tmp_path, pictures):
    bare = condit.load(write_vit(tmp_path, config=replace(VIT, classes=0)))
    assert bare.features(pictures(1)).patches.shape == (1, 16, 24)
    with pytest.raises(ValueError, match="has no head"):
        bare.classify(pictures(1))


def test_wrong_arguments_of_a_classifier_raise(vit, pictures):
    with pytest.raises(ValueError, match="top_k must be at least 1; found 0"):
        vit.classify(pictures(1), top_k=0)
    with pytest.raises(ValueError, match="No image in the list"):
        vit.classify([])


# Preprocessing


def test_transformers_preprocessing_equals_its_image_processor(tmp_path, pictures):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    picture = Image.fromarray(pictures(1)[0]).resize((37, 29))
    for fields in ({}, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}):
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, **fields)
        folder = write_vit(tmp_path / str(len(fields)))
        processor.save_pretrained(folder)
        expected = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(condit.load(folder).preprocess(picture), expected, rtol=0, atol=1e-5)


def test_the_authors_squash_without_smoothing_and_timm_crops_the_middle():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[::4] = 255
    jax = Preprocess((8, 8), Image.Resampling.BILINEAR, antialias=False)
    control = prepare(Image.fromarray(stripes), jax)
    assert torch.equal(control, -torch.ones(3, 8, 8))  # rows 1.5, 5.5, ... stand between the stripes
    timm = Preprocess((20, 20), Image.Resampling.BICUBIC, crop=0.5)
    wide = Image.fromarray(np.arange(80 * 40 * 3, dtype=np.uint32).reshape(40, 80, 3).astype(np.uint8))
    cut = torch.from_numpy(np.array(wide.crop((30, 10, 50, 30)))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(prepare(wide, timm), cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layout", "crop", "antialias"), [("npz", None, False), ("timm", 0.9, True)])
def test_the_preprocessing_is_that_of_the_publication(layout, crop, antialias, tmp_path):
    actual = condit.load(write_vit(tmp_path, layout)).parts.preprocess
    assert (actual.size, actual.crop, actual.antialias, actual.mean, actual.std) == (
        (16, 16),
        crop,
        antialias,
        (0.5,) * 3,
        (0.5,) * 3,
    )


def test_timms_own_configuration_is_followed(tmp_path):
    model = condit.load(write_vit(tmp_path, "timm")).model
    fields = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear", "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": fields}))
    loaded = read_preprocess(tmp_path, model)
    assert loaded == Preprocess((16, 16), Image.Resampling.BILINEAR, True, 1.0, (0.1, 0.2, 0.3), (1, 1, 1))
