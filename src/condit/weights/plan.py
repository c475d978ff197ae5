"""What a model needs before it is loaded: memory by part and time by step, from configurations and the headers of
weight files alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor, nn

from condit.backbones.mmdit import PRESETS, MMDiT, MMDiTConfig
from condit.data.hub import HubName
from condit.nn.cost import activation_bytes, average, cache_bytes, operations, ratio
from condit.nn.offload import check_device
from condit.weights.catalog import MODELS
from condit.weights.files import DTYPES, names_in, read_tensors
from condit.weights.flux import PREFIX, SIGN, infer_config, read_mmdit_config, vae_place
from condit.weights.folders import ENDINGS, choose_weights, optional_json
from condit.weights.hub_files import copy_headers
from condit.weights.plan_networks import NETWORKS, network_of, work_of
from condit.weights.quantise import BLOCKS, Quantise
from condit.weights.vit import read_any

Header = dict[str, Tensor]  # of a file, without data
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TEXT_TOKENS, TINY_TEXT_TOKENS = 512, 24  # of T5 and of the embedded model, for any prompt


@dataclass(frozen=True)
class PartPlan:
    """A part of a model: the number of its weights, bytes on disk by dtype, and bytes once loaded."""

    name: str
    parameters: int
    disk: Mapping[str, int]
    loaded: int


@dataclass(frozen=True)
class Plan:
    """Memory in bytes and work in operations for one batch. resident: the most memory on the device at once. offload:
    as in `condit.load`. rate: measured operations a second, or None."""

    model: str
    parts: tuple[PartPlan, ...]
    tokens: int
    condition_tokens: int
    cache: int
    activations: int
    operations_a_step: float
    steps: int
    resident: int
    offload: str | None
    rate: float | None = None

    @property
    def seconds(self) -> float | None:
        """All steps at the measured rate of matrix products, without norms and softmax; None without a rate."""
        return None if self.rate is None else self.steps * self.operations_a_step / self.rate

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Wish:
    """The settings of a pipeline call with `controls` conditions of `condition_size` pixels."""

    height: int = 1024
    width: int = 1024
    steps: int = 28
    batch: int = 1
    controls: int = 0
    condition_size: tuple[int, int] | None = None  # None: that of the image
    mode: Literal["joint", "independent", "cached"] = "joint"
    dtype: torch.dtype = torch.bfloat16
    quantize: Quantise | None = None
    offload: Literal["encoders", "blocks"] | None = None


def plan(source: str | Path, wish: Wish, *, components: str | Path | None = None, rate: float | None = None) -> Plan:
    """The plan for a folder or a single file of FLUX.1, for "tiny", or for the name of a preset ("flux-dev"), of which
    only the transformer counts; for Stable Diffusion, PixArt, DiT, DiffiT and ViT likewise, see `plan_network`. Of a
    name on a hub, configurations and headers of weights are downloaded. components: as in `condit.load`. ValueError for
    anything else, or for sizes out of range."""
    if (
        str(source).split("/")[0] not in MODELS
        and str(source) not in NETWORKS
        and (asked := HubName.of(source)) is not None
    ):
        with TemporaryDirectory() as folder:
            found = plan(copy_headers(asked, Path(folder)), wish, components=components, rate=rate)
            return replace(found, model=str(source))
    if not is_flux(source):
        return plan_network(source, wish, rate)
    config, parts, pixels = survey(source, wish, components)
    if wish.height % pixels or wish.width % pixels or min(wish.height, wish.width, wish.steps, wish.batch) < 1:
        raise ValueError(
            f"height and width must be multiples of {pixels}, steps and batch at least 1; found {wish.height} x "
            f"{wish.width}, {wish.steps} steps, batch {wish.batch}."
        )
    size, layers = wish.dtype.itemsize, config.num_layers + config.num_single_layers
    height, width = wish.condition_size or (wish.height, wish.width)
    text = TINY_TEXT_TOKENS if str(source) in MODELS else TEXT_TOKENS
    n = text + (wish.height // pixels) * (wish.width // pixels)
    each = (height // pixels) * (width // pixels)
    c, count = each * wish.controls, wish.controls
    cached = wish.mode == "cached"
    more = average(config.dim, n, each, count, wish.steps) if cached else ratio(wish.mode, config.dim, n, each, count)
    cache = cache_bytes(config.dim, layers, c * wish.batch, size) if cached else 0
    active = activation_bytes(config.dim, (n if cached else n + c) * wish.batch, size)
    return Plan(
        model=str(source),
        parts=tuple(parts),
        tokens=n,
        condition_tokens=c,
        cache=cache,
        activations=active,
        operations_a_step=wish.batch * operations(config.dim, layers, n) * more,
        steps=wish.steps,
        resident=resident(parts, config, wish, cache + active),
        offload=wish.offload,
        rate=rate,
    )


def is_flux(source: str | Path) -> bool:
    """Whether FLUX's transformer is planned: by name, configuration or tensors."""
    name, path = str(source), Path(source)
    if name in PRESETS:
        return True
    if path.is_file() and path.suffix in (".safetensors", ".sft"):
        return any(map(SIGN.match, names_in(path)))
    config = optional_json(path / "transformer" / "config.json")
    return bool(config) and not str(config.get("_class_name", "")).startswith(("PixArt", "DiT"))


def plan_network(source: str | Path, wish: Wish, rate: float | None = None) -> Plan:
    """The plan of a network that runs once without data. A step has the two predictions of guidance, except for a
    ViT's. ValueError for controls, which are counted for FLUX.1 only, or for an unknown model."""
    if wish.controls:
        raise ValueError(f"controls are counted for FLUX.1 only; found {wish.controls} for {source}.")
    name = str(source)
    path = MODELS[name].path if name in MODELS else Path(source)
    inside = {part: header_of(path / part) for part in subfolders(path)} if path.is_dir() else {}
    whole = read_any(path, "meta")[0] if path.is_file() else header_of(path)
    network = network_of(name, path, inside.get("transformer", whole))
    others = {part: tensors for part, tensors in inside.items() if part not in ("unet", "transformer")}
    for part, start in (("vae", "first_stage_model."), ("text encoders", "cond")):
        own = {key: tensor for key, tensor in whole.items() if key.startswith(start)}
        others |= {part: own} if own else {}
    on_disk = inside.get("unet", inside.get("transformer", whole))
    shapes = {key: tuple(p.shape) for key, p in network.state_dict().items()}
    loaded = sum(loaded_bytes(key, shape, wish) for key, shape in shapes.items())
    floating = 4 if name in MODELS else wish.dtype.itemsize
    parts = [PartPlan("network", sum(map(prod, shapes.values())), by_dtype(on_disk), loaded)]
    parts += [frozen_part(part, tensors, floating) for part, tensors in others.items()]
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child.children()]
    sizes = [sum(p.numel() for p in block.parameters()) * wish.dtype.itemsize for block in blocks]
    sides = 1 if type(network).__name__ == "ViT" else 2
    work = work_of(network, wish.height, wish.width, wish.batch * sides, wish.dtype)
    rest = [p.loaded for p in parts[1:]]
    peak = loaded + (work.activations + sum(rest) if wish.offload is None else max([work.activations, *rest]))
    peak -= sum(sizes) - max(sizes) if wish.offload == "blocks" and sizes else 0
    return Plan(
        name, tuple(parts), work.tokens, 0, 0, work.activations, work.operations, wish.steps, peak, wish.offload, rate
    )


def resident(parts: list[PartPlan], config: MMDiTConfig, wish: Wish, drawing: int) -> int:
    """The most memory on the device at once; `drawing`: of activations and caches."""
    transformer = next(p.loaded for p in parts if p.name == "transformer")
    others = [p.loaded for p in parts if p.name != "transformer"]
    if wish.offload is None:
        return transformer + sum(others) + drawing
    if wish.offload == "blocks":
        blocks, largest = block_bytes(config, wish)
        transformer += largest - blocks
    # Each encoder is on the device next to the transformer only while it runs; T5 and CLIP run together.
    text = sum(p.loaded for p in parts if p.name.startswith("text"))
    vae = max((p.loaded for p in parts if p.name == "vae"), default=0)
    return transformer + max(drawing, text, vae)


def block_bytes(config: MMDiTConfig, wish: Wish) -> tuple[int, int]:
    """Bytes of all blocks of a transformer, and of the largest."""
    with torch.device("meta"):
        model = MMDiT(config)
    sizes = [
        sum(loaded_bytes(f"{kind}.{i}.{name}", tuple(p.shape), wish) for name, p in block.named_parameters())
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(model.get_submodule(kind).children())
    ]
    return sum(sizes), max(sizes, default=0)


def loaded_bytes(name: str, shape: tuple[int, ...], wish: Wish) -> int:
    """Bytes of a tensor of the transformer: one a weight in quantised blocks (int8: and a scale for each row)."""
    count = prod(shape)
    if wish.quantize is None or not name.startswith(BLOCKS) or len(shape) != 2:
        return count * wish.dtype.itemsize
    return count + (shape[0] * wish.dtype.itemsize if wish.quantize == "int8" else 0)


# On disk


def survey(
    source: str | Path, wish: Wish, components: str | Path | None = None
) -> tuple[MMDiTConfig, list[PartPlan], int]:
    """Configuration, parts, and the side of a token in pixels."""
    name, path = str(source), Path(source)
    if name in PRESETS and name not in MODELS:
        return PRESETS[name], [transformer_part(PRESETS[name], {}, wish)], 16
    if name in MODELS and MODELS[name].kind == "model":
        path = MODELS[name].path
    if (path / "transformer" / "config.json").is_file():
        config = read_mmdit_config(path / "transformer")
        headers = {part: header_of(path / part) for part in subfolders(path)}
        parts = [transformer_part(config, headers.pop("transformer"), wish)]
    elif (
        path.is_file()
        and path.suffix in (".safetensors", ".sft")
        and any(map(SIGN.match, whole := read_tensors(path, "meta")))
    ):
        own = {n.removeprefix(PREFIX): t for n, t in whole.items() if n.startswith(PREFIX)} or whole
        file, path = path, Path(components or path.parent)
        like = path / "transformer"
        config = infer_config(own, file, read_mmdit_config(like) if (like / "config.json").is_file() else None)
        headers = {part: header_of(path / part) for part in subfolders(path) if part != "transformer"}
        vae = vae_place(path)
        headers |= {"vae": read_tensors(vae, "meta")} if vae is not None and vae.is_file() else {}
        parts = [transformer_part(config, own, wish)]
    else:
        raise ValueError(f"No model {name!r} to plan: is it a FLUX.1, with transformer/config.json?")
    # Embedded models run in float32.
    floating = 4 if name in MODELS else wish.dtype.itemsize
    return config, parts + [frozen_part(part, h, floating) for part, h in headers.items()], pixels_of(path / "vae")


def subfolders(folder: Path) -> list[str]:
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and any(d.glob("*.safetensors")))


def frozen_part(name: str, tensors: Header, floating: int) -> PartPlan:
    """An encoder or autoencoder whose weights take `floating` bytes each; buffers of integers keep their size."""
    loaded = sum(t.numel() * (floating if t.is_floating_point() else t.itemsize) for t in tensors.values())
    return PartPlan(name, sum(t.numel() for t in tensors.values()), by_dtype(tensors), loaded)


def transformer_part(config: MMDiTConfig, tensors: Header, wish: Wish) -> PartPlan:
    """Bytes on disk by the header, loaded ones by condit's own module."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MMDiT(config).state_dict().items()}
    loaded = sum(loaded_bytes(name, shape, wish) for name, shape in shapes.items())
    return PartPlan("transformer", sum(prod(s) for s in shapes.values()), by_dtype(tensors), loaded)


def by_dtype(tensors: Header) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[NAMES[tensor.dtype]] = sizes.get(NAMES[tensor.dtype], 0) + tensor.nbytes
    return sizes


def header_of(folder: Path) -> Header:
    if not folder.is_dir():
        return {}
    files = (folder / name for name in choose_weights([path.name for path in folder.iterdir()], folder, ENDINGS))
    return {name: t for file in files for name, t in read_tensors(file, "meta").items()}


def pixels_of(folder: Path) -> int:
    """The side of a token in pixels, by the autoencoder's configuration; FLUX.1's without one."""
    config = optional_json(folder / "config.json")
    return 2 * (config["patch"] if "patch" in config else 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1))


# The device


def measured_rate(device: torch.device | str, dtype: torch.dtype, *, side: int = 2048, seconds: float = 0.5) -> float:
    """Operations a second of a square matrix product, the best of as many as fit into `seconds`."""
    check_device(device)
    a = torch.randn(side, side, device=device).to(dtype)
    b, best, began = a.clone(), 0.0, time.perf_counter()

    def settle() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    _ = a @ b
    while best == 0.0 or time.perf_counter() - began < seconds:
        settle()
        start = time.perf_counter()
        _ = a @ b
        settle()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
