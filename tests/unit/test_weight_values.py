"""Weights that are no numbers to compute with are refused at loading, by the tensor's name."""

import pytest
import torch
from torch import nn

from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.weights.files import check_values, load_strict, save_tensors

NAN = torch.tensor([[1.0, float("nan")]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_a_weight_of_another_kind_of_number_is_refused(dtype):
    linear = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match=f"a.pt: 'weight' is {str(dtype)[6:]}; weights are floating-point"):
        load_strict(linear, {"weight": torch.ones(1, 2).to(dtype)}, source="a.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(dtype, bad):
    if dtype == torch.float8_e4m3fn and bad == float("inf"):
        pytest.skip("this type has no infinity")
    whole = torch.full((300,), 240.0).to(dtype)
    check_values({"a": whole, "empty": whole[:0], "meta": whole.to("meta")}, "a.pt")
    whole[7] = bad
    with pytest.raises(ValueError, match="a.pt: 'b' holds NaN or infinite values"):
        check_values({"a": whole[:7], "b": whole}, "a.pt")


def test_buffers_of_integers_are_read_as_they_are():
    norm = nn.BatchNorm1d(2)
    load_strict(norm, {**norm.state_dict(), "num_batches_tracked": torch.tensor(3)}, source="a.pt")
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    "change", [lambda x: x.to(torch.uint8), lambda x: x * float("nan"), lambda x: x.to(torch.cfloat)]
)
def test_adapters_with_such_tensors_are_refused(make_pipe, make_ip, make_omini, tmp_path, change):
    pipe = make_pipe()
    for kind, adapter in ((IPAdapter, make_ip(pipe)), (OminiControl, make_omini(pipe))):
        tensors = adapter.tensors()
        name = list(tensors)[1]
        file = save_tensors(tmp_path / "canny.safetensors", tensors | {name: change(tensors[name])})
        with pytest.raises(ValueError, match=f"{name!r} (is|holds)"):
            kind.load(file, pipe)


def test_kohyas_alpha_may_be_an_integer(make_pipe, make_omini, tmp_path):
    pipe = make_pipe()
    tensors = make_omini(pipe).tensors()
    alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(4) for n in tensors if "lora_A" in n}
    OminiControl.load(save_tensors(tmp_path / "canny.safetensors", tensors | alphas), pipe)
