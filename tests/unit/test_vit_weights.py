"""weights/vit.py: every layout is read strictly, written back to the same tensors, and a wrong file is told apart."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from condit.backbones.vit import FLAVOURS, PRESETS, ViT, ViTConfig
from condit.weights.files import read_metadata
from condit.weights.vit import for_finetuning, load_vit, read_vit, save_vit, what_is
from condit.weights.vit_layouts import Layout, to_layout

GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "vit"
TINY = ViTConfig(patch_size=4, image_size=16, dim=24, depth=2, heads=3, mlp_dim=40, classes=5)
LAYOUTS: dict[Layout, str] = {"npz": "a.npz", "linen": "a.npz", "timm": "a.safetensors", "transformers": "a"}


def random_vit(config: ViTConfig = TINY) -> ViT:
    g = torch.Generator().manual_seed(0)
    model = ViT(config, generator=g).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


def write(folder: Path, layout: Layout, config: ViTConfig = TINY) -> tuple[Path, ViT]:
    if layout in ("timm", "transformers"):
        config = replace(config, flavour=FLAVOURS[layout])
    model = random_vit(config)
    return save_vit(folder / LAYOUTS[layout], model.config, model.state_dict(), layout=layout), model


CONFIGS = {
    "token": TINY,
    "representation": replace(TINY, representation_size=7),
    "pooler": replace(TINY, representation_size=24, classes=0),
    "headless": replace(TINY, classes=0),
    "gap": replace(TINY, classifier="gap", class_token=False),
    "gap beside a class token": replace(TINY, classifier="gap"),
    "fc_norm": replace(TINY, classifier="gap", fc_norm=True),
    "gray": replace(TINY, in_channels=1),
    "twelve blocks": replace(TINY, depth=12),  # block 10 stands before block 2 in alphabetical order
}
TIMM_ONLY = ("gap beside a class token", "fc_norm")
NO_CLASS_TOKEN = ("gap", *TIMM_ONLY)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_every_layout_tells_its_configuration_and_gives_the_same_tensors(name, layout, tmp_path):
    if (layout != "timm" and name in TIMM_ONLY) or (
        layout == "transformers" and name in (*NO_CLASS_TOKEN, "representation")
    ):
        with pytest.raises(ValueError, match="timm"):
            write(tmp_path, layout, CONFIGS[name])
        assert not list(tmp_path.iterdir())
        return
    path, model = write(tmp_path, layout, CONFIGS[name])
    config, state = read_vit(path)
    assert config == model.config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    x = torch.randn(1, config.in_channels, 16, 16)
    with torch.no_grad():
        # The same weights; kernels sum in another order where a file's tensors lie unaligned in memory.
        torch.testing.assert_close(load_vit(path)(x), model(x), rtol=0, atol=2e-6)


def test_the_two_numberings_of_npz_differ_in_names_only(tmp_path):
    released, linen = (to_layout(random_vit().state_dict(), layout, 3) for layout in ("npz", "linen"))
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel" in released
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel" in linen
    assert [x.shape for x in released.values()] == [x.shape for x in linen.values()]
    assert released.keys() != linen.keys()


def test_what_tensors_cannot_tell_stands_in_the_metadata_of_our_own_timm_files(tmp_path):
    config = replace(
        TINY, image_size=(8, 32), classifier="unpooled", flavour=replace(TINY.flavour, gelu="quick", eps=1e-5)
    )
    path = save_vit(tmp_path / "a.safetensors", config, random_vit(config).state_dict(), layout="timm")
    assert read_vit(path)[0] == config
    assert json.loads(read_metadata(path)["condit"])["heads"] == 3


@pytest.mark.parametrize(
    ("layout", "flavour"), [("npz", "jax"), ("linen", "jax"), ("timm", "timm"), ("transformers5", "transformers")]
)
def test_a_plain_file_gets_the_flavour_of_its_layout_and_the_heads_of_its_width(layout, flavour, tmp_path):
    config = replace(PRESETS["ViT-Ti/16"], depth=1, mlp_dim=8, image_size=32, classes=2)
    tensors = to_layout(random_vit(config).state_dict(), layout, config.heads)
    if "/" in next(iter(tensors)) or "cls" in tensors:
        np.savez(tmp_path / "a", **{k: x.numpy() for k, x in tensors.items()})  # type: ignore[arg-type]
    else:
        save_file(tensors, tmp_path / "a.safetensors")
    actual, _ = read_vit(next(tmp_path.iterdir()))
    assert actual == replace(config, flavour=FLAVOURS[flavour])


def test_an_unpublished_width_needs_the_number_of_heads(tmp_path):
    path = save_file_of(tmp_path, random_vit().state_dict())
    with pytest.raises(ValueError, match="no published ViT has width 24. Give heads="):
        read_vit(path)
    assert read_vit(path, heads=3)[0].heads == 3
    with pytest.raises(ValueError, match="multiple of heads 5"):
        read_vit(path, heads=5)


def save_file_of(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file({k: x.detach().clone() for k, x in tensors.items()}, path)
    return path


def test_pytorch_files_and_folders_of_shards_are_read(tmp_path):
    state = random_vit().state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert read_vit(tmp_path / "a.pth", heads=3)[1].keys() == state.keys()
    folder = tmp_path / "parts"
    folder.mkdir()
    names = sorted(state)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({k: state[k].clone() for k in part}, folder / f"model-{i}.safetensors")
    assert read_vit(folder, heads=3)[1].keys() == state.keys()


def test_a_config_of_timm_next_to_our_own_file_does_not_hide_its_metadata(tmp_path):
    path, model = write(tmp_path, "timm")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny"}))
    assert path.parent == tmp_path
    assert read_vit(tmp_path)[0] == model.config


# The published lists of names of ViT-B/16, with 12 channels instead of 768, so that the files are small.
SMALLER = {768: 12, 3072: 48, 2304: 36, 64: 1, 21843: 7, 1000: 7}


def published(layout: str) -> dict[str, Tensor]:
    layout_file = json.loads((GOLDEN / f"layout_{layout}.json").read_text())
    shapes = (
        {row["hub"]: row["shape"] for row in layout_file["keys"].values()} if "keys" in layout_file else layout_file
    )
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn([SMALLER.get(int(n), int(n)) for n in shape], generator=g) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("layout", "ending"),
    [("npz_vit_b_16_imagenet21k", "npz"), ("timm_vit_b_16", "safetensors"), ("hf_vit_b_16", "bin")],
)
def test_a_file_with_the_published_list_of_names_loads_strictly(layout, ending, tmp_path):
    tensors, path = published(layout), tmp_path / f"vit.{ending}"

    def write_file(tensors: dict[str, Tensor]) -> Path:
        if ending == "npz":
            np.savez(path, **{k: x.numpy() for k, x in tensors.items()})  # type: ignore[arg-type]
        elif ending == "bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
        return path

    model = load_vit(write_file(tensors), heads=12)
    config = ViTConfig(dim=12, mlp_dim=48, classes=7, flavour=model.config.flavour)
    assert model.config == (replace(config, representation_size=12) if ending == "npz" else config)
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in tensors.values())
    last = list(tensors)[-1]
    with pytest.raises(ValueError, match=f"misses 1 tensors.*{last}.*It looks like a ViT in the layout"):
        load_vit(write_file({name: x for name, x in tensors.items() if name != last}), heads=12)


# Wrong files.


def drop(tensors: dict, name: str) -> None:
    del tensors[name]


def add(tensors: dict, name: str) -> None:
    tensors[name] = next(iter(tensors.values()))


def put(tensors: dict, name: str, *shape: int) -> None:
    tensors[name] = torch.zeros(shape)


BLOCK, LAYER = "Transformer/encoderblock_", "encoder.layer."


@pytest.mark.parametrize(
    ("layout", "spoil", "message"),
    [
        ("npz", lambda t: drop(t, f"{BLOCK}1/MlpBlock_3/Dense_1/kernel"), "misses 1 .*MlpBlock_3/Dense_1/kernel"),
        ("npz", lambda t: drop(t, f"{BLOCK}0/MultiHeadDotProductAttention_1/query/bias"), "misses 1 .*query/bias"),
        ("npz", lambda t: drop(t, "embedding/kernel"), "misses 1 .*embedding/kernel"),
        ("npz", lambda t: drop(t, "head/kernel"), "misses 1 .*head/kernel"),
        ("npz", lambda t: add(t, "conv_root/kernel"), "1 unexpected .*conv_root/kernel.*hybrid of ResNet"),
        ("linen", lambda t: drop(t, "Transformer/encoder_norm/scale"), "misses 1 .*encoder_norm/scale"),
        ("timm", lambda t: drop(t, "blocks.1.attn.qkv.bias"), "misses 1 .*blocks.1.attn.qkv.bias"),
        ("timm", lambda t: drop(t, "pos_embed"), "misses 1 .*pos_embed"),
        ("timm", lambda t: add(t, "dist_token"), "1 unexpected .*dist_token.*a DeiT"),
        ("timm", lambda t: add(t, "blocks.0.ls1.gamma"), "1 unexpected .*ls1.gamma.*layer scale"),
        ("timm", lambda t: put(t, "head.weight", 5, 9), r"1 of another shape .*\(5, 9\) instead of \(5, 24\)"),
        ("timm", lambda t: put(t, "pos_embed", 1, 16, 24), "positions for 15 patches"),
        ("timm", lambda t: put(t, "pos_embed", 17, 24), "three and four dimensions"),
        ("transformers", lambda t: drop(t, f"{LAYER}0.attention.attention.key.weight"), "misses 1 .*key.weight"),
        ("transformers", lambda t: put(t, "pooler.dense.weight", 24, 24), "1 unexpected .*pooler.dense.weight"),
        ("transformers", lambda t: add(t, "embeddings.mask_token"), "1 unexpected .*masked image modelling"),
        ("transformers", lambda t: add(t, f"{LAYER}9.layernorm_after.bias"), "misses 127 .*layer.2.*41 tensors found"),
    ],
)
def test_a_file_with_a_tensor_too_few_or_too_many_names_it_as_the_file_does(
    layout: Layout, spoil: Callable[[dict], None], message: str, tmp_path
):
    tensors = to_layout(random_vit().state_dict(), layout, 3)
    spoil(tensors)
    if layout in ("npz", "linen"):
        np.savez(tmp_path / "a.npz", **{k: x.numpy() for k, x in tensors.items()})  # type: ignore[arg-type]
        path = tmp_path / "a.npz"
    else:
        path = save_file_of(tmp_path, tensors)
    with pytest.raises(ValueError, match=message):
        read_vit(path, heads=3)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", "a CLIP"),
        ("blocks.0.adaLN_modulation.1.weight", "a DiT"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet"),
        ("transformer.blocks.0.lora_A.weight", "a LoRA"),
        ("layer1.0.conv1.weight", "a ResNet"),
        ("params/img/Transformer/encoderblock/LayerNorm_0/scale", "a big_vision file"),
    ],
)
def test_a_file_of_another_model_is_refused_with_a_guess(name, guess, tmp_path):
    path = save_file_of(tmp_path, {name: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"no ViT in the layout.*{name}.*{guess}"):
        read_vit(path)


def test_a_guess_is_not_made_from_nothing():
    assert what_is({"weight": torch.zeros(2)}) is None


def test_a_config_of_another_model_or_activation_is_refused(tmp_path):
    path, _ = write(tmp_path, "transformers")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"model_type": "deit"}))
    with pytest.raises(ValueError, match="describes a 'deit'"):
        read_vit(path)
    (path / "config.json").write_text(json.dumps(fields | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        read_vit(path)


def test_an_npz_with_python_objects_is_refused_and_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "a.npz", **{"Transformer/encoder_norm/bias": np.array([Bomb()], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Python objects.*refused"):
        read_vit(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_a_broken_archive_raises(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("cls.npy", b"not an array")
    with pytest.raises(ValueError, match="a.npz is broken"):
        read_vit(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        read_vit(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_vit(empty(tmp_path))


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


# Saving and fine-tuning.


def test_an_npz_is_not_written_where_its_readers_would_take_another_gelu(tmp_path):
    config = replace(TINY, flavour=FLAVOURS["timm"])
    state = random_vit(config).state_dict()
    with pytest.raises(ValueError, match=r"no place for gelu 'exact'.*FLAVOURS\['jax'\]"):
        save_vit(tmp_path / "a.npz", config, state, layout="npz")
    save_vit(tmp_path / "a.npz", replace(config, flavour=FLAVOURS["jax"]), state, layout="npz")


def test_a_state_that_does_not_fit_its_configuration_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="The state to save does not fit ViT.*blocks.1"):
        save_vit(tmp_path / "a", replace(TINY, depth=1), random_vit().state_dict(), layout="timm")
    assert not list(tmp_path.iterdir())


def test_bf16_is_kept_except_in_npz_which_has_no_bf16(tmp_path):
    model = random_vit().bfloat16()
    timm = save_vit(tmp_path / "a.safetensors", TINY, model.state_dict(), layout="timm")
    npz = save_vit(tmp_path / "a.npz", TINY, model.state_dict(), layout="npz")
    assert load_vit(timm).pos_embed.dtype is torch.bfloat16
    assert torch.equal(load_vit(npz).pos_embed, model.pos_embed.float())


def test_a_transformers_folder_has_the_hub_names_and_a_config(tmp_path):
    path, _ = write(tmp_path, "transformers")
    names = load_file(path / "model.safetensors")
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert "classifier.weight" in names
    assert json.loads((path / "config.json").read_text())["num_attention_heads"] == 3


def test_fine_tuning_drops_both_layers_of_the_head_and_resizes_the_positions():
    model = random_vit(replace(TINY, representation_size=7))
    config, state = for_finetuning(model.config, model.state_dict(), classes=9, image_size=(24, 8))
    tuned = ViT(config).eval()
    tuned.load_state_dict(state, strict=True)
    assert config == replace(TINY, classes=9, image_size=(24, 8))
    x = torch.randn(1, 3, 24, 8)
    with torch.no_grad():
        assert not tuned(x).any()  # a head of zeros
        assert torch.equal(tuned.features(x).patches, model.features(x).patches)
    assert model.state_dict()["pos_embed"].shape[1] == 17
