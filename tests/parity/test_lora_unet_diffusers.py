"""LoRA files on Stable Diffusion's UNet: every layout is the same LoRA, and it draws what diffusers draws with it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from condit.backbones.unet import PRESETS, UNet
from condit.controls.style_lora import StyleLoRA
from condit.nn.lora import LoRA, linear_shapes
from condit.weights.lora_unet import spelt, unet_lora

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out")


def random_lora(backbone: torch.nn.Module, rank: int = 2) -> LoRA:
    lora = LoRA(linear_shapes(backbone, TARGETS), rank)
    g = torch.Generator().manual_seed(0)
    for b in lora.b.values():
        b.data.normal_(0, 0.3, generator=g)
    return lora.requires_grad_(False)


def written(lora: LoRA, backbone: UNet, layout: str) -> dict[str, Tensor]:
    """The file of a LoRA of scale 1 as another tool would write it."""
    values = {}
    for path, key in lora.keys.items():
        a, b = lora.a[key], lora.b[key]
        if backbone.get_parameter(f"{path}.weight").ndim == 4:
            a, b = a[:, :, None, None], b[:, :, None, None]
        if layout == "diffusers":
            values |= {f"unet.{path}.lora_A.weight": a, f"unet.{path}.lora_B.weight": b}
        elif layout == "processors":
            if ".attn" in path:
                module, _, part = path.removesuffix(".0").rpartition(".")
                values |= {
                    f"unet.{module}.processor.{part}_lora.{side}.weight": w for side, w in (("down", a), ("up", b))
                }
            else:
                values |= {f"unet.{path}.lora.down.weight": a, f"unet.{path}.lora.up.weight": b}
        else:
            name = f"lora_unet_{path.replace('.', '_')}"
            values |= {
                f"{name}.lora_down.weight": a,
                f"{name}.lora_up.weight": b / 2,
                f"{name}.alpha": torch.tensor(4.0),
            }
    return {name: tensor.contiguous() for name, tensor in values.items()}


@pytest.fixture(scope="module")
def pair(make_sd, pairs):
    return pairs(make_sd)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "processors", "kohya"])
def test_every_layout_is_the_same_lora(pair, tmp_path: Path, kind: str, layout: str):
    ours = pair(kind)[1]
    lora = random_lora(ours.backbone)
    save_file(written(lora, ours.backbone, layout), tmp_path / "lora.safetensors")
    adapter = StyleLoRA.load(tmp_path / "lora.safetensors", ours)
    assert adapter.lora.keys == lora.keys
    how = {"seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    images = ours("a red fox", controls=[adapter.control(0.8)], **how).images
    wanted = ours("a red fox", controls=[StyleLoRA(lora, frozenset()).control(0.8)], **how).images
    torch.testing.assert_close(images, wanted, rtol=1e-5, atol=1e-4)
    assert (images - ours("a red fox", **how).images).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_generates_what_diffusers_generates_with_it(pair, tmp_path: Path, kind: str):
    theirs, ours = pair(kind)
    lora = random_lora(ours.backbone)
    save_file(written(lora, ours.backbone, "diffusers"), tmp_path / "lora.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs.set_adapters(theirs.get_active_adapters(), 0.7)
    how = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    wanted = theirs("a red fox", generator=torch.Generator().manual_seed(1), **how).images
    theirs.unload_lora_weights()
    control = StyleLoRA.load(tmp_path / "lora.safetensors", ours).control(0.7)
    images = ours("a red fox", controls=[control], generator=torch.Generator().manual_seed(1), **how).images
    torch.testing.assert_close(images, wanted, rtol=1e-5, atol=1e-4)


def test_sdxl_layers_in_the_authors_names_find_their_place():
    """kohya's names of SDXL: every attention layer of the full model."""
    with torch.device("meta"):
        unet = UNet(PRESETS["sdxl"])
    places = {  # authors' place of every attention -> diffusers'
        **{f"input_blocks_{n}_1": f"down_blocks.{(n - 1) // 3}.attentions.{(n - 1) % 3}" for n in (4, 5, 7, 8)},
        "middle_block_1": "mid_block.attentions.0",
        **{f"output_blocks_{n}_1": f"up_blocks.{n // 3}.attentions.{n % 3}" for n in range(6)},
    }
    back = {new: old for old, new in places.items()}
    tensors, paths = {}, list(linear_shapes(unet, TARGETS))
    for path in paths:
        match = re.match(r"(\w+_blocks?(?:\.\d)?\.attentions\.\d)\.(.*)", path)
        assert match is not None
        name = f"lora_unet_{back[match[1]]}_{match[2].replace('.', '_')}"
        assert spelt(name, PRESETS["sdxl"]) == path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": torch.zeros(1, 4), f"{name}.lora_up.weight": torch.zeros(4, 1)}
    assert len(paths) == 70 * 10 + 2 * 11
    assert len(unet_lora(tensors, None, unet)) == 2 * len(paths)


def test_parts_of_a_text_encoder_are_refused_or_ignored_on_demand(pair, tmp_path: Path):
    ours = pair("sd15")[1]
    tensors = written(random_lora(ours.backbone), ours.backbone, "kohya")
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 10)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="text encoder"):
        StyleLoRA.load(tmp_path / "lora.safetensors", ours)
    assert StyleLoRA.load(tmp_path / "lora.safetensors", ours, ignore_text=True).lora.rank == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_unet_down_blocks_0_attentions_0_proj_in", (2, 8, 3, 3)), ("lora_unet_no_such_layer", (2, 8))],
)
def test_layers_that_take_no_lora_raise(pair, tmp_path: Path, name: str, shape: tuple[int, ...]):
    ones = (1,) * (len(shape) - 2)
    tensors = {f"{name}.lora_down.weight": torch.zeros(shape), f"{name}.lora_up.weight": torch.zeros(8, 2, *ones)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{name}.*takes no LoRA there"):
        StyleLoRA.load(tmp_path / "lora.safetensors", pair("sd15")[1])


def test_a_lora_of_another_width_raises(pair, tmp_path: Path):
    ours = pair("sd15")[1]
    path = next(iter(linear_shapes(ours.backbone, ["to_q"])))
    tensors = {f"unet.{path}.lora_A.weight": torch.zeros(2, 320), f"unet.{path}.lora_B.weight": torch.zeros(320, 2)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"condit": json.dumps({})})
    with pytest.raises(ValueError, match="Was it made for another model"):
        StyleLoRA.load(tmp_path / "lora.safetensors", ours)
