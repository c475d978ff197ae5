"""The checks of `condit doctor`: versions, device, folders, embedded models, hub settings, extras."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import condit
from condit.data.files import atomic_write

LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")
EXTRAS = {  # extra -> what it is for, and its packages with a module of each
    "pairs": ("published pairs", {"datasets": "datasets"}),
    "serve": ("serve", {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus-client": "prometheus_client"}),
    "quantize": ("--quantize", {"torchao": "torchao"}),
    "svg": ("-o NAME.svg", {"vtracer": "vtracer"}),
    "ray": ("--engine ray, deploy/serve_ray.py", {"ray": "ray", "ray[data]": "pyarrow", "ray[serve]": "fastapi"}),
}
LOW_DISK_GB = 2


@dataclass(frozen=True)
class Finding:
    """state: ok, info (an extra is not installed) or bad (something will fail)."""

    state: Literal["ok", "info", "bad"]
    what: str
    text: str


def check(folder: Path) -> list[Finding]:
    """Runs all checks. Never raises, so that one broken part does not hide the others."""
    findings = [Finding("ok", "condit", condit.__version__)]
    findings.append(Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    for look in (libraries, device, folders, lambda: writable(folder), embedded_models, hub, extras):
        try:
            findings += look()
        except Exception as error:  # the report continues after a check that fails
            findings.append(Finding("bad", getattr(look, "__name__", "check"), f"{type(error).__name__}: {error}"))
    return findings


def libraries() -> Iterator[Finding]:
    for name in LIBRARIES:
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("bad", name, "missing; install condit again: pip install condit")


def device() -> Iterator[Finding]:
    """The device that torch computes on, and the number of threads."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        where = f"cuda: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB, bfloat16 {torch.cuda.is_bf16_supported()}"
    elif torch.backends.mps.is_available():
        where = "mps"
    else:
        where = "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    default = str(torch.get_default_dtype()).removeprefix("torch.")
    yield Finding("ok", "device", where)
    yield Finding("ok", "threads", f"{torch.get_num_threads()} of {cores} cores, default type {default}")
    finite = bool((torch.ones(8, 8) @ torch.ones(8, 8) == 8).all())
    state, word = ("ok", "correct") if finite else ("bad", "wrong")
    yield Finding(state, "arithmetic", f"a matrix product is {word}")


def folders() -> Iterator[Finding]:
    for name in ("CONDIT_HOME", "CONDIT_OUTPUT_DIR", "HF_HOME"):
        if value := os.environ.get(name):
            yield Finding("ok", name, value)


def writable(folder: Path) -> Iterator[Finding]:
    """Whether the default output folder can be written. Removes what it creates."""
    made = not folder.exists()
    probe = folder / ".condit-doctor"
    try:
        atomic_write(probe, lambda path: path.write_text("ok"))
        probe.unlink()
        free = shutil.disk_usage(folder).free / 1e9
        state = "ok" if free > LOW_DISK_GB else "bad"
        yield Finding(state, "output", f"{folder} can be written, {free:.0f} GB free")
    except OSError as error:
        yield Finding("bad", "output", f"{error.strerror}; set CONDIT_OUTPUT_DIR or use -o")
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def embedded_models() -> Iterator[Finding]:
    folder = Path(condit.__file__).parent / "assets" / "tiny"
    files = sorted(folder.parent.glob("tiny*/**/*.safetensors")) if folder.is_dir() else []
    if not files:
        yield Finding("bad", "models", "the embedded models are missing; install condit again")
        return
    from safetensors import SafetensorError, safe_open

    for path in files:
        name = path.relative_to(folder.parent).with_suffix("")
        try:
            with safe_open(path, framework="numpy") as file:
                count = len(list(file.keys()))
            yield Finding("ok", f"model {name}", f"{count} tensors, {path.stat().st_size / 1e6:.1f} MB")
        except SafetensorError as error:
            yield Finding("bad", f"model {name}", f"broken: {error}; install condit again")


def hub() -> Iterator[Finding]:
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _on(os.environ.get(name, ""))]
    online = "online, for models that are not embedded"
    yield Finding("ok", "hub", f"offline ({', '.join(offline)})" if offline else online)
    if endpoint := os.environ.get("HF_ENDPOINT"):
        yield Finding("ok", "hub endpoint", endpoint)
    token = "set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set (needed for gated models)"
    yield Finding("ok", "hub token", token)


def extras() -> Iterator[Finding]:
    for extra, (use, modules) in EXTRAS.items():
        missing = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
        what = f"not installed ({', '.join(missing)}): pip install 'condit[{extra}]'" if missing else "installed"
        yield Finding("info" if missing else "ok", f"extra {extra}", f"for {use}: {what}")


def _on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")
