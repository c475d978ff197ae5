"""Every path on a device: nothing mixes devices, and nothing in a step waits (tests/pretend.py, device_cases.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from device_cases import CASES, MOVING, Kit
from pretend import CudaWatch, DeviceFault, PretendDevice, watch_steps

every_case = pytest.mark.parametrize("name", CASES)
every_moving_case = pytest.mark.parametrize("name", MOVING)


@pytest.fixture(scope="module")
def make(make_pipe, make_latent, make_pixart, make_ip, make_omini, make_deadiff, pictures) -> dict[str, Any]:
    return {
        "pipe": make_pipe,
        "latent": make_latent,
        "pixart": make_pixart,
        "ip": make_ip,
        "omini": make_omini,
        "deadiff": make_deadiff,
        "pictures": pictures,
    }


def pretended(case, make: dict[str, Any], monkeypatch) -> tuple[Tensor, list[str]]:
    """The result of a case on the pretend device, and what waited in its steps."""
    device = PretendDevice()
    with device, torch.no_grad(), monkeypatch.context() as patch:
        watch_steps(patch, device)
        result = case(Kit(make, "meta", watch=device)).cpu()
    return result, device.faults


@every_case
def test_a_path_keeps_to_its_device_and_no_step_waits(make, monkeypatch, name):
    result, faults = pretended(CASES[name], make, monkeypatch)
    assert not faults
    with torch.no_grad():
        expected = CASES[name](Kit(make))
    # One unit in the last place: on some processors MKL chooses a kernel by the alignment of a tensor in memory.
    torch.testing.assert_close(result, expected, rtol=0, atol=6e-8 * float(expected.abs().max().clamp(min=1)))


@every_moving_case
def test_blocks_that_rest_on_the_cpu_are_all_that_is_copied(make, monkeypatch, name):
    result, faults = pretended(MOVING[name], make, monkeypatch)
    assert all("offload.py" in fault and fault.startswith("a copy to the device") for fault in faults) and faults
    with torch.no_grad():
        assert torch.equal(result, MOVING[name](Kit(make)))


# On a real device: pytest tests/unit/test_devices.py -m gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*CASES, *MOVING])
def test_a_path_runs_on_cuda_and_no_step_waits(make, monkeypatch, name, dtype):
    watch, case = CudaWatch(), {**CASES, **MOVING}[name]
    with torch.no_grad(), monkeypatch.context() as patch:
        if name in CASES:
            watch_steps(patch, watch)
        result = case(Kit(make, "cuda", dtype, watch)).float().cpu()
        assert result.isfinite().all()
        if dtype == torch.float32:
            expected = case(Kit(make))
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-3 * scale)  # other kernels, guided steps


# The pretend device detects what it is for


def test_mixed_devices_raise_except_for_0d_tensors():
    with PretendDevice():
        x, y = torch.ones(2, 3).to("meta"), torch.ones(2, 3)
        assert (x * torch.tensor(2.0)).device.type == "meta" and float((x * torch.tensor(2.0)).sum()) == 12
        for mixed in (
            lambda: x + y,
            lambda: torch.cat([x, y]),
            lambda: torch.stack([x[0, 0], y[0, 0]]),
            lambda: x @ y.T,
            lambda: y * x[0, 0],
            lambda: torch.where(y > 0, x, x),
            lambda: y[torch.tensor([0]).to("meta")],
            lambda: torch.nn.functional.scaled_dot_product_attention(x, y, y),
            lambda: torch.nn.functional.linear(x, y),
        ):
            with pytest.raises(DeviceFault):
                mixed()
        with pytest.raises(DeviceFault):
            x.numpy()


WAITS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.any() else 0,
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "list": lambda x: x[[0, 1]],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(2).to(x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "like": lambda x: torch.ones(2).to(x),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_recorded_in_a_step_only(name):
    device = PretendDevice()
    with device:
        x = torch.ones(2, 3).to("meta")
        WAITS[name](x)
        with device.strict(), device.relaxed():
            WAITS[name](x)
        assert not device.faults
        with device.strict():
            WAITS[name](x)
        assert len(device.faults) == 1


def test_work_in_a_step_is_no_fault_and_its_numbers_are_those_of_the_cpu():
    device = PretendDevice()

    def work(x: Tensor) -> Tensor:
        y = x.softmax(-1).unflatten(0, (-1, 1)) + torch.full((3,), 0.5, device=x.device) * torch.arange(
            3, device=x.device
        )
        y[:, 0] += 1
        y[y > 1] = 0.25
        return torch.cat([y, torch.zeros_like(y)], 1).masked_fill(torch.tensor(False), 1.0)

    values = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with device:
        x = values.to("meta")
        with device.strict():
            y = work(x)
        assert not device.faults
        y = y.cpu()
    assert type(y) is Tensor and torch.equal(y, work(values))
