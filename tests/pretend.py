"""A pretend device: it computes on the CPU, but what was moved to it cannot be mixed with tensors on the CPU.

Tensors on it report the device "meta" and hold their values in `held`. An operation that mixes devices raises
DeviceFault, as CUDA would. Within `strict()` everything that waits for a device is recorded in `faults`: reading a
number, copies in either direction, boolean masks, `nonzero`. `CudaWatch` is the same for a real device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten

# Their result has a size, or a Python value, that depends on numbers on the device.
WAITING = {
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "is_nonzero",
    "_local_scalar_dense",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave.Tensor",
}
READS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__format__,
)


class DeviceFault(AssertionError):
    """What a real device would refuse."""


class OnDevice(torch.Tensor):
    """A tensor on the pretend device."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        assert not isinstance(inner, OnDevice)
        outer = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        outer.held = inner
        return outer

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise DeviceFault(f"{func} outside of its PretendDevice.")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mode = PretendDevice.active
        if mode is not None and func in READS:
            mode.waits(func.__name__)
            return func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        if mode is not None and func in (Tensor.numpy, Tensor.__array__):
            raise DeviceFault("A tensor on a device has no numpy array: use .cpu() first.")
        if mode is not None and func is F.scaled_dot_product_attention:
            mode.check_one_device(
                "scaled_dot_product_attention", [t for t in tree_leaves((args, kwargs)) if is_tensor(t)]
            )
            return OnDevice(func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs)))
        with torch._C.DisableTorchFunctionSubclass():  # results on the CPU stay plain tensors
            return func(*args, **kwargs)


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def inner_of(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


class Watch(Protocol):
    """Where steps must not wait, and where they may."""

    def strict(self) -> AbstractContextManager[None]: ...

    def relaxed(self) -> AbstractContextManager[None]: ...


class PretendDevice(TorchDispatchMode):
    """While it is entered, `.to("meta")` and `device="meta"` put tensors on the pretend device."""

    active: PretendDevice | None = None

    def __init__(self):
        super().__init__()
        self.depth: list[bool] = []
        self.faults: list[str] = []
        self.numbers = FromNumbers()

    def __enter__(self):
        PretendDevice.active = self
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *how):
        PretendDevice.active = None
        done = super().__exit__(*how)
        self.numbers.__exit__(*how)
        return done

    @contextmanager
    def strict(self) -> Iterator[None]:
        self.depth.append(True)
        try:
            yield
        finally:
            self.depth.pop()

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        self.depth.append(False)
        try:
            yield
        finally:
            self.depth.pop()

    def waits(self, what: str) -> None:
        if self.depth and self.depth[-1]:
            fault = f"{what} at {caller()}"
            if fault not in self.faults:
                self.faults.append(fault)

    def check_one_device(self, name: str, tensors: list[Tensor], scalars: bool = False) -> None:
        """Tensors of one call: on the device all, but for CPU tensors of no dimension where `scalars` is true."""
        on_cpu = [t for t in tensors if not isinstance(t, OnDevice) and not (scalars and t.ndim == 0)]
        if on_cpu and any(isinstance(t, OnDevice) for t in tensors):
            raise DeviceFault(f"{name}: a tensor {tuple(on_cpu[0].shape)} on the CPU meets the device, at {caller()}.")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = any(isinstance(t, OnDevice) for t in tensors)
        name, target = func.overloadpacket.__name__, kwargs.get("device")
        inputs, named = tree_map(inner_of, args), tree_map(inner_of, kwargs)
        if target is not None:
            named["device"] = CPU
        if func is aten._to_copy.default:
            there = here if target is None else torch.device(target).type == DEVICE.type
            if there != here:
                self.waits("a copy to the device" if there else "a copy to the CPU")
            out = func(*inputs, **named)
            return OnDevice(out) if there else out
        if func is aten.copy_.default:
            into, source = args[0], args[1]
            if isinstance(into, OnDevice) != isinstance(source, OnDevice) and not (
                isinstance(into, OnDevice) and source.ndim == 0
            ):
                self.waits("copy_ between devices")
            func(*inputs, **named)
            return into
        if here and (name in WAITING or f"{name}.{func._overloadname}" in WAITING):
            self.waits(name)
            out = func(*inputs, **named)
            return tree_map(lambda t: wrapped(t, {}), out)
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            self.check_index(name, args)
        else:
            # TensorIterator takes a CPU tensor of no dimension as a number, in elementwise operations only.
            scalars = torch.Tag.pointwise in func.tags or name in ("add_", "mul_", "sub_", "div_", "where", "lerp")
            self.check_one_device(name, tensors, scalars)
            if scalars and here and all(t.ndim == 0 for t in tensors if isinstance(t, OnDevice)):
                self.check_one_device(name, [t for t in tensors if t.ndim or isinstance(t, OnDevice)])
        out = func(*inputs, **named)
        there = here if target is None else torch.device(target).type == DEVICE.type
        if not there:
            return out
        outer = {id(inner_of(t)): t for t in tensors if isinstance(t, OnDevice)}  # what works in place returns itself
        return tree_map(lambda t: wrapped(t, outer), out)

    def check_index(self, name: str, args: tuple) -> None:
        x, indices = args[0], [i for i in args[1] if i is not None]
        if not isinstance(x, OnDevice):
            if any(isinstance(i, OnDevice) for i in indices):
                raise DeviceFault(f"{name}: a tensor on the CPU with indices on the device, at {caller()}.")
            return
        masked = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        if masked and not (
            name.startswith("index_put") and args[2].numel() == 1
        ):  # one number fills, and does not wait
            self.waits(f"{name} by a boolean mask")
        if any(not isinstance(i, OnDevice) for i in indices):
            self.waits(f"{name} by indices on the CPU")
        if len(args) > 2 and not isinstance(args[2], OnDevice) and args[2].ndim:
            raise DeviceFault(f"{name}: values on the CPU, at {caller()}.")


def wrapped(value: Any, known: dict[int, OnDevice]) -> Any:
    """A tensor on the device, in the wrapper that it already has."""
    if not is_tensor(value):
        return value
    return known[id(value)] if id(value) in known else OnDevice(value)


class FromNumbers(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` is a tensor on the CPU that is copied."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        return func(*args, **kwargs)


def caller() -> str:
    """The innermost line of the library or an example that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/src/condit/" in name or "/examples/" in name or "test_pretend" in name:
            return f"{name.rsplit('/', 2)[-2]}/{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class CudaWatch:
    """The same on a real device: within `strict` CUDA raises where the program would wait."""

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def strict(self) -> AbstractContextManager[None]:
        return self.mode("error")

    def relaxed(self) -> AbstractContextManager[None]:
        return self.mode("default")


def within(context: Callable[[], Any], function: Callable) -> Callable:
    """The function, run in a context of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return run


def watch_steps(monkeypatch, watch: Watch) -> None:
    """Predictions, samplers, inversions and methods of editing run in `strict`; what a run sets up once, noise and the
    callbacks of callers in `relaxed`."""
    from condit.drawing import classes, edit, flow, pixels, vp
    from condit.drawing.pipeline import Pipeline

    predictor, noise = Pipeline.predictor, Pipeline.noise
    monkeypatch.setattr(Pipeline, "predictor", lambda *a, **k: within(watch.strict, predictor(*a, **k)))
    monkeypatch.setattr(Pipeline, "noise", lambda *a, **k: within(watch.relaxed, noise(*a, **k)))
    for model in (flow.FlowModel, vp.VPModel, classes.ClassModel, pixels.PixelModel):
        monkeypatch.setattr(model, "network", within(watch.relaxed, model.network))
        monkeypatch.setattr(model, "path", strict_sampler(watch, model.path))
    for name in ("to_noise", "walk"):
        monkeypatch.setattr(edit, name, within(watch.strict, getattr(edit, name)))
    edit_noise = edit.image_noise
    monkeypatch.setattr(edit, "image_noise", lambda generators: within(watch.relaxed, edit_noise(generators)))
    monkeypatch.setattr(edit.Inverted, "__call__", within(watch.strict, edit.Inverted.__call__))


def strict_sampler(watch: Watch, path: Callable) -> Callable:
    def of(*args: Any, **kwargs: Any):
        sampler, levels = path(*args, **kwargs)
        return within(watch.strict, sampler), levels

    return of
