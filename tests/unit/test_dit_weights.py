"""weights/dit.py: every layout of DiT files read and written; others refused with what is missing and a guess."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.dit import PRESETS, DiT, DiTConfig
from condit.weights.dit import load_dit, save_dit, to_diffusers

TINY = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
ODD = replace(TINY, input_size=(4, 12), mlp_ratio=3.0, class_dropout_prob=0.0, learn_sigma=False, in_channels=3)
GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "dit"
LAYOUTS = {"official": "dit.pt", "training": "training.pt", "diffusers": "transformer"}


def build(config: DiTConfig = TINY, seed: int = 0) -> DiT:
    model, g = DiT(config).eval(), torch.Generator().manual_seed(seed)
    model.initialise(g)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


def inputs(config: DiTConfig = TINY) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, config.in_channels, *config.latent, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 417, 999]), torch.tensor([0, 4, 2])


def assert_same(actual: DiT, expected: DiT) -> None:
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(actual.state_dict()[name], value) for name, value in expected.state_dict().items())


def diffusers_dit(**fields):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    given = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    return DiTTransformer2DModel(**{**given, "num_embeds_ada_norm": 5, **fields}).eval().requires_grad_(False)


# Round trips


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_returns_the_same_weights(layout, tmp_path):
    model, path = build(), tmp_path / LAYOUTS[layout]
    assert save_dit(model, path, layout=layout) == path
    loaded = load_dit(path, num_heads=None if layout == "diffusers" else 4)  # a .pt has no room for them
    assert_same(loaded, model)
    assert loaded.config == TINY and not loaded.training
    assert not loaded.pos_embed.requires_grad and loaded.x_embedder.proj.weight.requires_grad


@pytest.mark.parametrize(
    "config", [TINY, ODD, replace(TINY, num_classes=0), replace(TINY, gates=False, zero_init=False)]
)
def test_our_own_file_keeps_the_whole_configuration(config, tmp_path):
    model = build(config)
    save_dit(model, tmp_path / "dit.safetensors")
    loaded = load_dit(tmp_path / "dit.safetensors")
    assert loaded.config == config
    assert_same(loaded, model)


def test_metadata_of_our_own_file_precede_a_config_json(tmp_path):
    """The trainer writes both; without it the last class would be taken for the null class."""
    config = replace(build().config, class_dropout_prob=0.0)
    save_dit(build(config), tmp_path / "transformer" / "model.safetensors")
    config_of_diffusers = {"num_attention_heads": config.num_heads, "sample_size": config.input_size}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config_of_diffusers))
    assert load_dit(tmp_path).config == load_dit(tmp_path / "transformer").config == config


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/8"])
def test_the_heads_of_published_widths_are_known(name, tmp_path):
    config = replace(PRESETS[name], depth=1, num_classes=3)
    save_dit(DiT(config), tmp_path / "dit.pt")
    assert load_dit(tmp_path / "dit.pt").config == config


def test_a_file_without_gates_or_labels_is_recognised_by_its_tensors(tmp_path):
    config = replace(TINY, num_classes=0, gates=False)
    save_dit(build(config), tmp_path / "dit.pt")
    actual = load_dit(tmp_path / "dit.pt", num_heads=4).config
    assert (actual.num_classes, actual.gates) == (0, False)


def test_the_last_label_may_be_a_class(tmp_path):
    save_dit(build(ODD), tmp_path / "dit.pt")
    loaded = load_dit(tmp_path / "dit.pt", num_heads=4, null_class=False, input_size=(4, 12))
    assert loaded.config == ODD
    assert load_dit(tmp_path / "dit.pt", num_heads=4, input_size=(4, 12)).config.num_classes == 4


def test_the_dtype_of_the_file_is_kept(tmp_path):
    save_dit(build().to(torch.bfloat16), tmp_path / "dit.pt")
    assert {p.dtype for p in load_dit(tmp_path / "dit.pt", num_heads=4).parameters()} == {torch.bfloat16}


def test_an_official_file_is_flat_and_read_without_code(tmp_path):
    save_dit(build(), tmp_path / "dit.pt")
    loaded = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert list(loaded) == list(build().state_dict())


@pytest.mark.parametrize("release", ["layout_dit_xl_2_256", "layout_dit_xl_2_512"])
def test_a_file_with_the_released_list_of_names_loads_strictly(release, tmp_path):
    """The network of 28 blocks, 48 channels wide instead of 1152, so that the file is small."""
    released = json.loads((GOLDEN / f"{release}.json").read_text())["keys"]
    side = 32 if release.endswith("256") else 64
    config = DiTConfig(input_size=side, hidden_size=48, num_heads=16, num_classes=1000)
    state = DiT(config).state_dict()
    assert list(state) == list(released) and len(released) == 292
    torch.save({name: state[name] for name in released}, tmp_path / "dit.pt")
    assert load_dit(tmp_path / "dit.pt", num_heads=16).config == config
    torch.save({name: state[name] for name in list(released)[:-1]}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=rf"1 missing \(first: {list(released)[-1]}\).*It looks like a DiT"):
        load_dit(tmp_path / "dit.pt", num_heads=16)


# Training files


def test_a_training_file_gives_its_average_by_default(tmp_path):
    model, ema = build(), build(seed=1)
    save_dit(model, tmp_path / "training.pt", layout="training", ema=ema)
    assert_same(load_dit(tmp_path / "training.pt", num_heads=4), ema)
    assert_same(load_dit(tmp_path / "training.pt", num_heads=4, weights="model"), model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_files_of_the_official_trainer_and_of_fast_dit_are_read(prefix, wrapped, tmp_path):
    model = build()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256)
    held = {"model": build(seed=2).state_dict(), "ema": state, "opt": optimizer, "args": arguments}
    torch.save(held if wrapped else state, tmp_path / "0050000.pt")
    assert_same(load_dit(tmp_path / "0050000.pt", num_heads=4), model)


def test_a_file_without_positions_gets_the_fixed_ones(tmp_path):
    model = build()
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    torch.save(state, tmp_path / "dit.pt")
    assert_same(load_dit(tmp_path / "dit.pt", num_heads=4, input_size=8), model)
    assert load_dit(tmp_path / "dit.pt", num_heads=4).config.input_size == 32  # the published one
    assert load_dit(tmp_path / "dit.pt", num_heads=4).pos_embed.shape == (1, 256, 32)


# diffusers


def test_names_and_shapes_of_the_published_folder_equal_diffusers():
    with torch.device("meta"):
        ours, theirs = (
            DiT(PRESETS["DiT-XL/2"]),
            diffusers_dit(
                num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=32, num_embeds_ada_norm=1000
            ),
        )
    values = {name: value.shape for name, value in to_diffusers(ours.state_dict()).items()}
    assert values == {name: value.shape for name, value in theirs.state_dict().items()}


def test_a_folder_of_ours_is_loaded_by_diffusers_and_computes_the_same_but_for_its_timestep_features(tmp_path):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model, (x, t, y) = build(), inputs()
    save_dit(model, tmp_path / "transformer", layout="diffusers")
    theirs, facts = DiTTransformer2DModel.from_pretrained(  # type: ignore[misc]
        tmp_path / "transformer", output_loading_info=True
    )
    assert not any(facts.values())
    expected = model(x, t, y)

    def run() -> Tensor:
        return theirs(x, timestep=t, class_labels=y).sample

    # At t = 0 all features are cos 0 or sin 0, so the frequencies, where diffusers differs, do not matter.
    torch.testing.assert_close(run()[0], expected[0], rtol=0, atol=1e-5)
    assert (run()[1:] - expected[1:]).abs().max() > 1e-3
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_saved_by_diffusers_is_read_as_the_official_function(root, safe, tmp_path):
    torch.manual_seed(0)
    theirs, (x, t, y) = diffusers_dit(norm_eps=1e-6), inputs()
    first: Any = theirs.get_submodule("transformer_blocks.0.norm1.emb")
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())  # type: ignore[union-attr] - published blocks hold copies
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # type: ignore[union-attr]
    theirs.save_pretrained(tmp_path / "transformer", safe_serialization=safe)
    loaded = load_dit(tmp_path if root else tmp_path / "transformer")
    assert loaded.config == TINY
    torch.testing.assert_close(loaded(x, t, y), theirs(x, timestep=t, class_labels=y).sample, rtol=0, atol=1e-5)


def test_a_single_file_in_diffusers_layout_needs_its_heads_only(tmp_path):
    save_file({k: v.clone() for k, v in to_diffusers(build().state_dict()).items()}, tmp_path / "x.safetensors")
    assert_same(load_dit(tmp_path / "x.safetensors", num_heads=4, input_size=8), build())


def test_a_folder_whose_blocks_were_trained_apart_is_refused(tmp_path):
    save_dit(build(), tmp_path / "t", layout="diffusers")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1.*linear_1\.bias differs.*diffusers only"):
        load_dit(tmp_path / "t")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ODD, "without a null class"),
        (replace(TINY, mlp_ratio=3.0), "mlp_ratio 3.0"),
        (replace(TINY, num_classes=0), "unconditional"),
        (replace(TINY, gates=False), "without gates"),
        (replace(TINY, input_size=(4, 12)), "only squares"),
    ],
)
def test_diffusers_has_no_place_for_some_networks(config, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*'official'"):
        save_dit(DiT(config), tmp_path / "t", layout="diffusers")
    assert not (tmp_path / "t").exists()


def test_diffusers_has_no_place_for_other_positions(tmp_path):
    model = build()
    with torch.no_grad():
        model.pos_embed.mul_(0.5)
    with pytest.raises(ValueError, match="position table of its own"):
        save_dit(model, tmp_path / "t", layout="diffusers")


# Wrong files


def saved(tmp_path: Path, names: list[str], shape: tuple[int, ...] = (4, 4)) -> Path:
    torch.save({name: torch.zeros(shape) for name in names}, tmp_path / "other.pt")
    return tmp_path / "other.pt"


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (["blocks.0.attn.qkv_temb.weight", "blocks.0.attn.qkv.weight"], "a latent DiffiT; load it with load_diffit"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet of diffusers"),
        (["cls_token", "blocks.0.attn.qkv.weight"], "a ViT"),
        (["encoder.conv_in.weight"], "a VAE"),
        (["transformer.x.lora_A.weight"], "a LoRA, for condit.OminiControl"),
        (["image_proj.proj.weight"], "a file for condit.IPAdapter"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX of its authors"),
        (["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.norm.linear.weight"], "a FLUX"),
        (["transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"], "a PixArt"),
    ],
)
def test_a_file_of_another_model_is_refused_with_what_is_missing_and_a_guess(names, guess, tmp_path):
    with pytest.raises(ValueError, match=rf"missing \(first: .*It looks like {guess}"):
        load_dit(saved(tmp_path, names))


def test_a_file_without_one_tensor_is_refused_by_its_name(tmp_path):
    state = build().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"1 missing \(first: blocks\.1\.mlp\.fc2\.bias\)"):
        load_dit(tmp_path / "dit.pt", num_heads=4)


def test_a_folder_without_one_tensor_is_refused_by_diffusers_name(tmp_path):
    save_dit(build(), tmp_path / "t", layout="diffusers")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["transformer_blocks.1.ff.net.2.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"1 missing \(first: transformer_blocks\.1\.ff\.net\.2\.bias\)"):
        load_dit(tmp_path / "t")


def test_a_tensor_too_many_is_refused(tmp_path):
    torch.save(build().state_dict() | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"1 unexpected \(first: blocks\.0\.attn\.q_norm\.weight\)"):
        load_dit(tmp_path / "dit.pt", num_heads=4)


def test_an_unknown_width_asks_for_the_heads(tmp_path):
    save_dit(build(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"no published DiT has width 32. Give num_heads="):
        load_dit(tmp_path / "dit.pt")


def test_positions_that_are_no_square_ask_for_the_size(tmp_path):
    save_dit(build(ODD), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"positions for 12 tokens.*Give input_size="):
        load_dit(tmp_path / "dit.pt", num_heads=4)


def test_a_block_number_out_of_all_bounds_makes_no_long_loop(tmp_path):
    state = build().state_dict()
    state["blocks.999999999.mlp.fc2.bias"] = torch.zeros(32)
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="missing"):
        load_dit(tmp_path / "dit.pt", num_heads=4)


def test_a_field_of_a_later_version_is_refused(tmp_path):
    config = {"class": "DiT", "rope": True}
    save_file(build().state_dict(), tmp_path / "dit.safetensors", metadata={"condit": json.dumps(config)})
    with pytest.raises(ValueError, match="'rope', which DiT does not"):
        load_dit(tmp_path / "dit.safetensors")


def test_an_empty_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_dit(tmp_path)
