"""ViT (arXiv:2010.11929) against golden/vit: tensors written by the authors' JAX model, timm 1.0.31, transformers 5.23;
and against transformers on random models. What is compared, and how exactly: lab/src/condit_lab/parity/vit.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from condit.backbones.vit import FLAVOURS
from condit.weights.vit import load_vit, read_vit, save_vit
from condit_lab.parity.check import difference
from condit_lab.parity.vit import CHECKS, TOLERANCE, build, images, read_authors

GOLDEN = Path(__file__).parent / "golden" / "vit"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_authors_timms_and_transformers_tensors_are_reproduced(check):
    assert check.run(GOLDEN).exceeding() == []


def test_the_fixtures_tell_the_flavours_apart():
    config, state, t = read_authors(GOLDEN, "vit_token")
    with torch.no_grad():
        exact = build(replace(config, flavour=FLAVOURS["timm"]), state)(images(t))
    assert difference(exact, t["output.logits"]) > 10 * TOLERANCE


def transformers_vit(*, classes: int, image_size: int | tuple[int, int], act: str):
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = TheirConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=image_size,  # type: ignore[arg-type]
        patch_size=4,
        num_labels=classes,  # type: ignore[call-arg] - taken by its base class
        hidden_act=act,
        pooler_output_size=24,
    )
    model = (ViTForImageClassification if classes else ViTModel)(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms of weight one and biases of zero would hide a mistake
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("image_size", [16, (12, 20)])
def test_a_folder_saved_by_transformers_gives_its_logits_at_every_size(image_size, act, tmp_path):
    theirs = transformers_vit(classes=5, image_size=image_size, act=act)
    theirs.save_pretrained(tmp_path)
    ours = load_vit(tmp_path)
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert difference(ours(x), theirs(x).logits) <= TOLERANCE
        if height == width:  # transformers resizes square tables only
            for size in ((24, 24), (8, 20), (8, 32)):  # the last has as many patches as the table
                x = torch.randn(2, 3, *size)
                assert difference(ours(x), theirs(x, interpolate_pos_encoding=True).logits) <= TOLERANCE


@pytest.mark.parametrize("classes", [0, 5])
def test_a_folder_that_we_save_is_read_by_transformers_without_a_missing_or_unexpected_name(classes, tmp_path):
    theirs = transformers_vit(classes=classes, image_size=16, act="gelu_pytorch_tanh")
    theirs.save_pretrained(tmp_path / "a")
    config, state = read_vit(tmp_path / "a")
    save_vit(tmp_path / "b", config, state, layout="transformers")
    again, report = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)  # type: ignore[misc]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for actual, expected in zip(again(x).to_tuple(), theirs(x).to_tuple(), strict=True):
            assert torch.equal(actual, expected)
