"""LoRAs of CLIP text encoders: equal to diffusers', in every layout, and nothing is left in the model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import condit
from condit.controls.style_lora import StyleLoRA
from condit.interop import attach
from condit.nn.lora import LoRA, linear_shapes
from test_sd_diffusers import assert_equal, generators

HOW = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def folders(make_sd, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd")
    for kind in ("sd15", "sdxl"):
        make_sd(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sd15", "sdxl")}


def tensors_of(pipe: condit.Pipeline, layout: str, *, alpha: float = 4.0) -> dict[str, Tensor]:
    """A LoRA of rank 2 of the network's queries and of the attention and MLP of every text encoder."""
    generator = torch.Generator().manual_seed(0)
    unet = LoRA(linear_shapes(pipe.backbone, ("to_q",)), 2)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    tensors = {name.replace("transformer.", "unet.", 1): t for name, t in unet.tensors().items()}
    for number, encoder in enumerate(pipe.parts.text.encoders):
        for path, module in encoder.named_modules():
            if not isinstance(module, nn.Linear) or not path.endswith(("q_proj", "fc1")):
                continue
            path = path.removeprefix("text_model.")
            a = 0.3 * torch.randn(2, module.in_features, generator=generator)
            b = 0.3 * torch.randn(module.out_features, 2, generator=generator)
            if layout == "kohya":
                which = "lora_te" if len(pipe.parts.text.encoders) == 1 else f"lora_te{number + 1}"
                key = f"{which}_text_model_{path.replace('.', '_')}"
                tensors |= {
                    f"{key}.lora_down.weight": a,
                    f"{key}.lora_up.weight": b,
                    f"{key}.alpha": torch.tensor(alpha),
                }
            else:
                key = f"text_encoder{'_2' if number else ''}.text_model.{path}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b * alpha / 2}
    return tensors


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_of_text_encoders_equals_diffusers_and_leaves_the_model_as_it_is(folders, kind, tmp_path):
    ours = condit.load(folders[kind])
    save_file(tensors_of(ours, "diffusers"), tmp_path / "lora.safetensors")
    diffusers = __import__("diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders[kind])
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    theirs.set_adapters(theirs.get_active_adapters(), 0.7)
    wanted = theirs("a red fox", generator=generators(1), **HOW).images
    before = {name: t.clone() for name, t in ours.parts.text.state_dict().items()}
    plain = ours("a red fox", seed=0, **HOW).images
    control = StyleLoRA.load(tmp_path / "lora.safetensors", ours).control(0.7)
    assert_equal(ours("a red fox", controls=[control], generator=generators(1), **HOW).images, wanted)
    assert all(torch.equal(t, before[name]) for name, t in ours.parts.text.state_dict().items())
    assert torch.equal(ours("a red fox", seed=0, **HOW).images, plain)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohyas_layout_is_the_same_and_strength_0_and_ignore_text_do_not_act(folders, kind, tmp_path):
    ours = condit.load(folders[kind])
    made = []
    for layout in ("diffusers", "kohya"):
        save_file(tensors_of(ours, layout), tmp_path / f"{layout}.safetensors")
        adapter = StyleLoRA.load(tmp_path / f"{layout}.safetensors", ours)
        made.append(ours("a red fox", seed=0, controls=[adapter.control()], **HOW).images)
    assert torch.equal(made[0], made[1])
    without = StyleLoRA.load(tmp_path / "kohya.safetensors", ours, ignore_text=True).control()
    assert not torch.equal(ours("a red fox", seed=0, controls=[without], **HOW).images, made[1])
    off = StyleLoRA.load(tmp_path / "kohya.safetensors", ours).control(0.0)
    assert torch.equal(ours("a fox", seed=0, controls=[off], **HOW).images, ours("a fox", seed=0, **HOW).images)


def test_a_layer_that_the_encoders_do_not_have_and_a_guest_are_told(folders, make_sd, tmp_path):
    ours = condit.load(folders["sd15"])
    tensors = tensors_of(ours, "kohya")
    save_file(tensors, tmp_path / "a.safetensors")
    with attach(make_sd("sd15")) as guest, pytest.raises(ValueError, match="text encoder"):
        StyleLoRA.load(tmp_path / "a.safetensors", guest)
    save_file({name.replace("layers_0", "layers_9"): t for name, t in tensors.items()}, tmp_path / "b.safetensors")
    control = StyleLoRA.load(tmp_path / "b.safetensors", ours).control()
    with pytest.raises(ValueError, match="no such layer. Was the LoRA made for another model"):
        ours("a fox", controls=[control], **HOW)
