"""weights/diffit.py: release files and our own, strictly or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from condit.backbones.diffit import PRESETS, DiffiT, DiffiTConfig
from condit.backbones.diffit_image import DiffiTImage, DiffiTImageConfig
from condit.weights.diffit import (
    INDEX,
    config_of,
    diffit_of,
    load_diffit,
    load_diffit_image,
    relative_position_index,
    save_diffit,
)
from condit.weights.files import read_metadata, read_tensors, save_tensors

GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "diffit"
TINY = DiffiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
IMAGE = DiffiTImageConfig(blocks=(1, 1), widths=(8, 16), window=4, time_dim=12, time_features=8, head_dim=4)
RELEASES = {"DiffiT-XL/2": "layout_diffit_256", "DiffiT-XL/2-512": "layout_diffit_512"}


def layout(preset: str) -> dict:
    return json.loads((GOLDEN / f"{RELEASES[preset]}.json").read_text())


def release(preset: str) -> dict[str, Tensor]:
    """Tensors with the released names and shapes; only the indices hold numbers."""
    index = relative_position_index(PRESETS[preset].grid)
    shapes = layout(preset)["keys"]
    return {k: index if k.endswith(INDEX) else torch.empty(s, device="meta") for k, s in shapes.items()}


@pytest.fixture
def model() -> DiffiT:
    torch.manual_seed(0)
    return DiffiT(TINY).eval()


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    return save_tensors(path, tensors)


@pytest.mark.parametrize("preset", RELEASES)
def test_the_released_names_and_shapes_load_strictly_as_their_preset(preset):
    tensors = release(preset)
    assert len(tensors) == 346
    model = diffit_of(tensors, source=preset)
    assert model.config == PRESETS[preset]
    assert sum(p.numel() for p in model.parameters()) == layout(preset)["num_parameters"]
    assert not any(k.endswith(INDEX) for k in model.state_dict())


@pytest.mark.parametrize("preset", RELEASES)
def test_a_released_file_without_its_indices_loads_too(preset):
    tensors = {k: v for k, v in release(preset).items() if not k.endswith(INDEX)}
    assert diffit_of(tensors, source=preset).config == PRESETS[preset]


def test_the_index_of_two_by_two_tokens():
    # Offsets query minus key in a table of 3 x 3; a token to itself is the middle, 4.
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index((2, 2)).tolist() == expected


@pytest.mark.parametrize("indices", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, input_size=(4, 8)),
        replace(TINY, num_classes=0),
        replace(TINY, class_dropout_prob=0.0),
        replace(TINY, learn_sigma=False, mlp_ratio=1.7),
    ],
    ids=["plain", "rectangular", "unconditional", "no_null", "no_sigma"],
)
def test_a_saved_model_comes_back_bit_by_bit_with_its_config(config, indices, tmp_path):
    model = DiffiT(config)
    loaded = load_diffit(save_diffit(model, tmp_path / "a.safetensors", indices=indices))
    assert loaded.config == config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_sizes_are_read_off_a_file_that_holds_no_config(model, tmp_path):
    path = saved(tmp_path / "a.safetensors", model.state_dict())
    assert read_metadata(path) == {}
    assert load_diffit(path).config == TINY


def test_a_pytorch_file_and_half_precision_load_as_they_are(model, tmp_path):
    torch.save(model.bfloat16().state_dict(), tmp_path / "a.pt")
    assert load_diffit(tmp_path / "a.pt").final_layer.linear.weight.dtype == torch.bfloat16


def test_a_folder_as_the_trainer_exports_it_is_read_and_one_with_other_files_raises(model, tmp_path):
    save_diffit(model, tmp_path / "export" / "transformer" / "model.safetensors")
    for folder in (tmp_path / "export", tmp_path / "export" / "transformer"):
        assert load_diffit(folder).config == TINY
    save_diffit(DiffiTImage(IMAGE), tmp_path / "pixels" / "model.safetensors")
    assert load_diffit_image(tmp_path / "pixels").config == IMAGE
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds 0 safetensors files"):
        load_diffit(tmp_path / "empty")


def test_an_image_model_comes_back_bit_by_bit(tmp_path):
    model = DiffiTImage(IMAGE)
    loaded = load_diffit_image(save_diffit(model, tmp_path / "a.safetensors"))
    assert loaded.config == IMAGE
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["blocks.1.attn.qkv_temb.bias", "pos_embed", "blocks.0.mlp.fc1.weight"])
def test_a_missing_tensor_is_named(model, name, tmp_path):
    tensors = {k: v for k, v in model.state_dict().items() if k != name}
    with pytest.raises(ValueError, match=rf"a\.safetensors does not fit DiffiT.*missing.*{name}"):
        load_diffit(saved(tmp_path / "a.safetensors", tensors))


def test_a_tensor_too_many_is_named(model, tmp_path):
    tensors = {**model.state_dict(), "blocks.0.attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"1 unexpected \(first: blocks.0.attn.q_norm.weight\)"):
        load_diffit(saved(tmp_path / "a.safetensors", tensors))


def test_a_missing_block_raises_with_the_names_of_the_next_one(model, tmp_path):
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.0.")}
    with pytest.raises(ValueError, match="missing.*blocks.0.attn.relative_position_bias_table"):
        load_diffit(saved(tmp_path / "a.safetensors", tensors))


def test_an_index_that_numbers_otherwise_is_refused(model, tmp_path):
    index = relative_position_index(TINY.grid)
    tensors = {**model.state_dict(), f"blocks.1{INDEX}": index.T.contiguous()}
    with pytest.raises(ValueError, match=r"blocks.1.attn.relative_position_index \(16, 16\) is not the index"):
        load_diffit(saved(tmp_path / "a.safetensors", tensors))


def dit_names() -> dict[str, Tensor]:
    return {"pos_embed": torch.zeros(1, 16, 8), "blocks.0.adaLN_modulation.1.weight": torch.zeros(48, 8)}


@pytest.mark.parametrize(
    ("tensors", "looks"),
    [
        (dit_names(), "a DiT"),
        ({"cls_token": torch.zeros(1, 1, 8)}, "a ViT"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(8, 8)}, "diffusers"),
        ({"blocks.0.mlp.w12.weight": torch.zeros(8, 8)}, "SwiGLU"),
        ({"image_proj.proj.weight": torch.zeros(8, 8)}, "condit.IPAdapter"),
        (DiffiTImage(IMAGE).state_dict(), "load_diffit_image"),
    ],
    ids=["dit", "vit", "diffusers", "rewrite", "ip_adapter", "image_space"],
)
def test_another_models_file_fails_with_the_missing_names_and_a_guess(tensors, looks, tmp_path):
    with pytest.raises(ValueError, match=rf"missing \(first: .*looks like .*{looks}"):
        load_diffit(saved(tmp_path / "a.safetensors", tensors))


def test_a_latent_model_is_no_image_model(model, tmp_path):
    with pytest.raises(ValueError, match=r"missing \(first: tokenizer.*a latent DiffiT; load it with load_diffit"):
        load_diffit_image(save_diffit(model, tmp_path / "a.safetensors"))


def test_a_config_of_a_later_version_is_refused(model, tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", model.state_dict(), {"condit": {"class": "DiffiT", "rope": True}})
    with pytest.raises(ValueError, match="its config has 'rope'"):
        load_diffit(path)


def test_tensors_that_tell_nothing_are_measured_against_xl_2():
    assert config_of({}) == config_of({"pos_embed": torch.zeros(3)}) == PRESETS["DiffiT-XL/2"]


def test_indices_are_written_only_on_request(model, tmp_path):
    names = read_tensors(save_diffit(model, tmp_path / "a.safetensors")).keys()
    assert names == model.state_dict().keys()
    with_indices = read_tensors(save_diffit(model, tmp_path / "b.safetensors", indices=True)).keys()
    assert with_indices - names == {f"blocks.{i}{INDEX}" for i in range(2)}
