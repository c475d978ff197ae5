"""LoRA files between layouts, and models to folders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import condit
from condit.backbones.unet import PRESETS, UNet
from condit.weights.convert import convert_adapter, lora_as
from condit.weights.lora_files import published


def lora(paths: dict[str, tuple[int, int]], alpha: float = 6.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path, (out, into) in paths.items():
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"transformer.{path}.alpha"] = torch.tensor(alpha)
    return tensors


def update(tensors: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    a, b = (tensors[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
    return b @ a * float(tensors.get(f"transformer.{path}.alpha", torch.tensor(float(len(a))))) / len(a)


PATH = "single_transformer_blocks.3.attn.to_q"


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_the_update_of_a_flux_lora_is_the_same_in_every_layout(layout, tmp_path):
    made = lora({PATH: (4, 4)})
    save_file(made, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout, "flux")
    names = load_file(tmp_path / "b.safetensors")
    assert not set(names) & set(made) or layout == "diffusers"
    torch.testing.assert_close(update(published(names), PATH), update(made, PATH))


def test_a_unet_lora_of_kohya_becomes_one_of_diffusers(tmp_path):
    with torch.device("meta"):
        module = next(name for name, _ in UNet(PRESETS["sd15"]).named_modules() if name.endswith("attn1.to_q"))
    made = lora({module: (320, 320)})
    kohya = lora_as(made, "kohya", "unet")
    assert set(kohya) == {
        f"lora_unet_{module.replace('.', '_')}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    save_file(kohya, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", "sd15")
    names = load_file(tmp_path / "b.safetensors")
    assert set(names) == {f"unet.{module}.lora_{side}.weight" for side in "AB"}


def test_another_adapter_takes_no_layout_and_keeps_its_metadata(tmp_path, make_pipe, make_omini):
    save_file({"image_proj.proj.weight": torch.zeros(2, 2)}, tmp_path / "ip.safetensors", {"condit": "{}"})
    convert_adapter(tmp_path / "ip.safetensors", tmp_path / "copy.safetensors", None, "flux")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "ip.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is no LoRA"):
        convert_adapter(tmp_path / "ip.safetensors", tmp_path / "x.safetensors", "kohya", "flux")


def test_an_embedded_model_is_not_saved(random_tiny, tmp_path):
    with pytest.raises(ValueError, match="'tiny' is part of condit"):
        condit.Pipeline.from_pretrained("tiny").save_pretrained(tmp_path / "saved")
