"""`condit plan`: its figures are those of the real tensors."""

import json
from dataclasses import replace

import pytest
import torch

import condit
from class_models import DIT, VIT
from condit.backbones.dit import DiT
from condit.backbones.mmdit import MMDiTConfig
from condit.backbones.vit import ViT
from condit.cli import main
from condit.controls.omini import OminiConfig, OminiControl
from condit.drawing.pipeline import Pipeline
from condit.nn.lora import Linear
from condit.weights.dit import save_dit
from condit.weights.files import read_tensors, save_tensors
from condit.weights.plan import Wish, measured_rate, plan
from condit.weights.vit import save_vit

CONFIG = MMDiTConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
WISH = Wish(24, 32, steps=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_flux):
    model = tmp_path_factory.mktemp("flux") / "model"
    make_flux(CONFIG, dynamic=True).save_pretrained(model)
    return model


@pytest.fixture(scope="module")
def pipe(folder) -> Pipeline:
    return condit.load(folder, dtype=torch.float32)


def size(module: torch.nn.Module) -> tuple[int, int]:
    """Weights and bytes, tied ones once."""
    unique = {id(p): p for p in module.parameters()}.values()
    return sum(p.numel() for p in unique), sum(p.nbytes for p in unique)


def test_parameters_and_bytes_of_every_part_are_those_of_the_loaded_model(folder, pipe):
    values = {p.name: (p.parameters, p.loaded) for p in plan(folder, WISH).parts}
    real = {"transformer": pipe.backbone, "text_encoder": pipe.parts.text.clip, "text_encoder_2": pipe.parts.text.t5}
    assert values == {name: size(module) for name, module in {**real, "vae": pipe.parts.vae}.items()}
    half = {p.name: p.loaded for p in plan(folder, replace(WISH, dtype=torch.bfloat16)).parts}
    assert half == {name: loaded // 2 for name, (_, loaded) in values.items()}
    disk = {p.name: p.disk for p in plan(folder, WISH).parts}
    assert disk["transformer"] == {"F32": values["transformer"][1]}


def test_a_cache_has_the_planned_bytes_and_a_joint_condition_has_no_cache(folder, pipe, pictures):
    adapter = OminiControl.new(pipe.backbone, OminiConfig(independent=True))
    adapter = OminiControl(adapter.lora.requires_grad_(False), adapter.config, pipe)
    control = adapter.control(pictures(1), size=(16, 24)).prefill("a fox")
    assert control.cache is not None
    real = sum(t.nbytes for pair in control.cache.keys_values.values() for t in pair)
    wish = replace(WISH, controls=1, condition_size=(16, 24), mode="cached")
    actual = plan(folder, wish)
    assert actual.cache == real and actual.condition_tokens == 24
    assert plan(folder, replace(wish, controls=3, batch=2)).cache == 6 * real
    assert plan(folder, replace(wish, mode="joint")).cache == 0


def test_quantised_bytes_are_those_of_quantised_blocks(folder):
    small = condit.load(folder, dtype=torch.float32, quantize="float8")
    actual = plan(folder, replace(WISH, quantize="float8"))
    assert actual.parts[0].loaded == size(small.backbone)[1]
    rows = sum(m.out_features for n, m in small.backbone.named_modules() if isinstance(m, Linear) and "blocks." in n)
    assert plan(folder, replace(WISH, quantize="int8")).parts[0].loaded == actual.parts[0].loaded + 4 * rows


def test_offloading_leaves_the_largest_block_and_one_encoder_on_the_device(folder, pipe):
    whole, encoders, blocks = (plan(folder, replace(WISH, offload=how)) for how in (None, "encoders", "blocks"))
    drawing = whole.activations
    sizes = {p.name: p.loaded for p in whole.parts}
    assert whole.resident == sum(sizes.values()) + drawing
    text = sizes["text_encoder"] + sizes["text_encoder_2"]
    assert encoders.resident == sizes["transformer"] + max(drawing, text, sizes["vae"])
    each = [size(b)[1] for b in (*pipe.backbone.transformer_blocks, *pipe.backbone.single_transformer_blocks)]
    assert encoders.resident - blocks.resident == sum(each) - max(each)


def test_operations_are_those_of_the_cost_model_and_time_is_theirs_at_the_rate(folder):
    n, d, layers = 512 + 48, 32, 5
    actual = plan(folder, replace(WISH, batch=2), rate=1e9)
    assert actual.operations_a_step == 2 * layers * (24 * d * d * n + 4 * d * n * n)
    assert actual.seconds == pytest.approx(3 * actual.operations_a_step / 1e9)
    joint = plan(folder, replace(WISH, controls=1)).operations_a_step
    cached = plan(folder, replace(WISH, controls=1, mode="cached", steps=28)).operations_a_step
    plain = plan(folder, WISH).operations_a_step
    assert plain < cached < joint
    # FLUX.1 at 512 px beside a condition of 512 px: 21.5 TFLOP a step, 1.752 times as much with it.
    wish = Wish(512, 512, controls=1)
    assert plan("flux-dev", wish).operations_a_step == pytest.approx(1.752 * 21.5e12, rel=2e-3)
    assert plan("flux-dev", replace(wish, mode="cached")).cache == 717_225_984


def test_a_single_file_is_planned_by_its_header(folder, authors, tmp_path):
    tensors = condit.load(folder, dtype=torch.bfloat16).backbone.state_dict()
    save_tensors(tmp_path / "flux1.safetensors", authors(tensors))
    actual = plan(tmp_path / "flux1.safetensors", WISH, components=folder)
    expected = plan(folder, WISH)
    assert [(p.name, p.parameters, p.loaded) for p in actual.parts] == [
        (p.name, p.parameters, p.loaded) for p in expected.parts
    ]
    assert set(actual.parts[0].disk) == {"BF16"} and actual.resident == expected.resident
    weight = read_tensors(tmp_path / "flux1.safetensors", "meta")["img_in.weight"]
    assert weight.is_meta and (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (32, 8))


def test_the_embedded_model_can_be_planned():
    actual = plan("tiny", replace(WISH, height=128, width=128))
    assert actual.tokens == 24 + 64 and {p.name for p in actual.parts} == {"transformer", "canvas", "clip", "vae"}


def test_what_cannot_be_planned_raises(folder, tmp_path):
    with pytest.raises(ValueError, match="No model 'nothing' to plan.*flux-dev"):
        plan("nothing", WISH)
    with pytest.raises(ValueError, match="multiples of 4.*found 24 x 30"):
        plan(folder, replace(WISH, width=30))
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="neither safetensors nor a PyTorch file"):
        plan(tmp_path / "bad.safetensors", WISH)


def test_a_rate_is_measured():
    assert measured_rate("cpu", torch.float32, side=64, seconds=0.01) > 1e6


def test_the_command_prints_the_plan(folder, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    given = (str(folder), "--height", "24", "--width", "32", "--controls", "1", "--cached", "--offload", "blocks")
    code, out, _ = run(*given)
    assert code == 0 and all(word in out for word in ("transformer", "vae", "cache", "peak", "TFLOP"))
    code, out, _ = run(*given, "--json")
    assert (
        code == 0
        and json.loads(out)["cache"] == plan(folder, Wish(24, 32, controls=1, mode="cached", offload="blocks")).cache
    )
    assert run(*given, "--quantize", "int3")[0] == 2
    assert run("nothing")[0] == 1


def test_operations_of_other_networks_are_those_of_their_papers():
    found = plan("DiT-S/8", Wish(256, 256, dtype=torch.float32))
    assert found.operations_a_step / 4 == pytest.approx(0.36e9, rel=0.02)  # Table 4 counts multiplications; two sides
    assert found.tokens == 16 and found.parts[0].parameters == pytest.approx(33e6, rel=0.02)


def test_embedded_models_of_other_families_can_be_planned():
    for name in ("tiny-unet", "small-dit", "small-diffit"):
        found = plan(name, Wish(128, 128, dtype=torch.float32))
        assert found.operations_a_step > 1e6 and found.activations > 1000 and found.resident > found.parts[0].loaded
    with pytest.raises(ValueError, match="controls are counted for FLUX.1 only"):
        plan("tiny-unet", Wish(128, 128, controls=1))


@pytest.mark.parametrize("kind", ["dit.pt", "training.pt", "vit.npz", "timm.safetensors", "transformers"])
def test_files_of_class_models_are_planned_without_their_data(kind, tmp_path):
    path = tmp_path / kind
    if "dit" in kind or "training" in kind:
        model = DiT(replace(DIT, hidden_size=384, num_heads=6))  # the width tells the heads
        save_dit(model, path, layout="training" if "training" in kind else "official")
    else:
        model = ViT(VIT)
        save_vit(path, VIT, model.state_dict(), layout=path.stem if kind != "vit.npz" else "npz")
    actual = plan(path, Wish(32, 32, steps=1, dtype=torch.float32) if "vit" not in kind else Wish(16, 16))
    (network, *_) = actual.parts
    assert network.parameters == sum(t.numel() for t in model.state_dict().values())
    assert set(network.disk) == {"F32"} and actual.operations_a_step > 0


def test_a_name_on_a_hub_is_planned_by_configurations_and_headers(hub, folder, tmp_path):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.add("a/flux", files)
    actual, expected = plan("a/flux", WISH), plan(folder, WISH)
    assert actual == replace(expected, model="a/flux")
    asked = [line for line in hub.requests if "/store/" in line and "bytes=" in line]
    assert asked and all("bytes=0-" in line and not line.rstrip("]) ").endswith("-") for line in asked)
    with pytest.raises(ValueError, match="x.bin of a/bare@.* has no header that can be read alone. Download it first"):
        hub.add("a/bare", {"config.json": b"{}", "x.bin": b"x"})
        plan("a/bare", WISH)
