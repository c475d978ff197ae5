"""nn/offload.py and weights/quantise.py: what rests, what is copied, and that the pictures stay."""

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condit.drawing.flow import FlowModel
from condit.drawing.pipeline import Pipeline
from condit.nn.lora import Linear
from condit.nn.offload import OffloadedBlocks, on_device, with_blocks
from condit.weights.quantise import Float8Linear, in_blocks, quantise

GIVEN = {"seed": 0, "output_type": "pt"}


def test_a_copy_on_a_device_leaves_the_module_where_it_was_and_keeps_ties():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    there = on_device(module, "meta")
    assert all(t.device.type == "meta" for t in (*there.parameters(), *there.buffers()))
    assert there[2].weight is there[0].weight and isinstance(there[0].weight, nn.Parameter)
    assert all(t.device.type == "cpu" for t in (*module.parameters(), *module.buffers()))
    assert there.state_dict().keys() == module.state_dict().keys()
    here = on_device(module, "cpu")
    assert here is not module and here[0].weight is module[0].weight  # nothing to copy


def test_blocks_come_one_at_a_time_and_the_model_itself_is_not_changed(make_pipe):
    backbone = make_pipe().backbone
    resting = with_blocks(backbone, OffloadedBlocks)
    resting.transformer_blocks.move("meta")
    first = next(iter(resting.transformer_blocks))
    assert first.ff.net[2].weight.device.type == "meta"
    assert all(p.device.type == "cpu" for p in resting.parameters())
    assert type(backbone.transformer_blocks) is nn.ModuleList and isinstance(
        resting.transformer_blocks, OffloadedBlocks
    )
    assert resting.sites == backbone.sites


@pytest.mark.parametrize("offload", ["encoders", "blocks"])
@pytest.mark.parametrize("independent", [True, False])
def test_offloading_generates_the_same_image(make_pipe, make_omini, pictures, offload, independent):
    plain, saving = make_pipe(), Pipeline(make_pipe().parts, offload=offload).to("cpu")
    control = make_omini(plain, independent=independent).control(pictures(1))
    assert torch.equal(*[pipe("a fox", controls=[control], **GIVEN).images for pipe in (plain, saving)])


def test_while_offloaded_encoders_rest_and_work_on_a_copy(make_pipe):
    """The device here is one that computes nothing, so that whatever lies on it can be told."""
    pipe = Pipeline(make_pipe().parts, offload="blocks").to("meta")
    assert all(p.device.type == "cpu" for p in pipe.parts.vae.parameters())
    assert all(p.device.type == "meta" for p in cast("FlowModel", pipe.model).on_duty(pipe.parts.vae).parameters())
    blocks = (pipe.backbone.transformer_blocks, pipe.backbone.single_transformer_blocks)
    assert all(p.device.type == "cpu" for b in blocks for p in b.parameters())
    assert pipe.backbone.x_embedder.weight.device.type == pipe.device.type == "meta"
    assert all(p.device.type == "meta" for block in blocks[0] for p in block.parameters())
    encoders = Pipeline(make_pipe().parts, offload="encoders").to("meta")
    assert all(p.device.type == "meta" for p in encoders.backbone.parameters())
    assert all(p.device.type == "cpu" for p in encoders.parts.vae.parameters())


def test_two_threads_share_an_offloaded_model(make_pipe, make_omini, pictures):
    pipe = Pipeline(make_pipe().parts, offload="blocks")
    adapters = [make_omini(pipe, seed=s) for s in (1, 2)]

    def draw(i: int) -> torch.Tensor:
        return pipe("a fox", controls=[adapters[i].control(pictures(2)[i])], **GIVEN).images

    alone = [draw(0), draw(1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, [0, 1, 0, 1]))
    assert all(torch.equal(actual, alone[i % 2]) for i, actual in enumerate(together))


def test_an_unknown_kind_of_offloading_is_refused(make_pipe):
    with pytest.raises(ValueError, match="offload must be 'encoders', 'blocks' or None; found 'all'"):
        Pipeline(make_pipe().parts, offload="all")  # type: ignore[arg-type]


# Quantised weights


def test_float8_halves_the_weights_of_the_blocks_and_hardly_changes_the_image(make_pipe, make_omini, pictures):
    pipe, plain = make_pipe(), make_pipe()
    quantise(pipe.backbone, "float8")
    kept = {n: p for n, p in pipe.backbone.named_parameters() if p.dtype == torch.float8_e4m3fn}
    wanted = {f"{n}.weight" for n, m in plain.backbone.named_modules() if isinstance(m, Linear) and "blocks." in n}
    assert set(kept) == wanted and all(
        p.dtype == torch.float32 for n, p in pipe.backbone.named_parameters() if n not in kept
    )
    assert pipe.dtype == torch.float32
    for controls in ([], [make_omini(plain).control(pictures(1))]):
        results = [p("a fox", controls=controls, **GIVEN).images for p in (pipe, plain)]
        assert 1e-4 < (results[0] - results[1]).abs().mean() < 0.1  # e4m3 has three bits behind the first


def test_gradients_pass_through_float8_weights_to_an_adapter(make_pipe):
    layer = Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    Float8Linear(layer)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.to(torch.float8_e4m3fn).float().sum(0).expand(2, 4))


class Int8(nn.Module):
    """Stands for torchao's weights: bytes with a scale per row."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        self.scale = like.weight.detach().abs().amax(1, keepdim=True) / 127
        self.bytes = (like.weight.detach() / self.scale).round().to(torch.int8)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.bytes.float() * self.scale


def test_int8_is_torchaos_for_the_same_layers(make_pipe, make_omini, pictures, monkeypatch):
    """torchao itself puts a subclass of tensor in the weight's place; here a parametrisation does."""
    seen = []

    def quantize_(model, config, filter_fn):
        for path, module in list(model.named_modules()):
            if filter_fn(module, path):
                seen.append((path, config))
                nn.utils.parametrize.register_parametrization(module, "weight", Int8(module), unsafe=True)

    fake = types.ModuleType("torchao.quantization")
    fake.Int8WeightOnlyConfig, fake.quantize_ = (lambda: "int8"), quantize_  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    pipe, plain = make_pipe(), make_pipe()
    quantise(pipe.backbone, "int8")
    assert {c for _, c in seen} == {"int8"}
    assert {p for p, _ in seen} == {n for n, m in plain.backbone.named_modules() if in_blocks(m, n)}
    control = make_omini(plain).control(pictures(1))
    results = [p("a fox", controls=[control], **GIVEN).images for p in (pipe, plain)]
    assert 1e-5 < (results[0] - results[1]).abs().mean() < 0.05


def test_without_torchao_int8_tells_what_to_do(make_pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'condit\[quantize\]'.*float8' needs nothing"):
        quantise(make_pipe().backbone, "int8")
    with pytest.raises(ValueError, match="'float8' or 'int8'; found 'int3'"):
        quantise(make_pipe().backbone, "int3")  # type: ignore[arg-type]


def test_float8_is_close_to_a_product_of_rounded_weights():
    layer, x = Linear(16, 8), torch.randn(3, 16)
    expected = F.linear(x, layer.weight.to(torch.float8_e4m3fn).float(), layer.bias)
    assert torch.equal(Float8Linear(layer)(x), expected)
