"""The plan of every network besides FLUX's: it runs once on tensors without data, whose operations and bytes are
counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from condit.backbones import diffit, dit, mmdit, pixart, unet, vit
from condit.controls.control import Control
from condit.nn.attention import Attend, Call
from condit.weights import original_sd
from condit.weights.diffit import config_of as diffit_config
from condit.weights.dit import load_dit
from condit.weights.folders import optional_json, read_json
from condit.weights.load import PUBLISHED
from condit.weights.pixart import LIMITS, pixart_config
from condit.weights.stable_diffusion import unet_config
from condit.weights.vit import read_vit
from condit.weights.vit_layouts import find_layout

# Published names -> presets of the backbones.
PRESETS = {name: row.preset for name, row in PUBLISHED.items() if row.preset} | {"tiny-pixart": "pixart-tiny"}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{key: partial(unet.UNet, c) for key, c in unet.PRESETS.items()},
    **{key: partial(pixart.PixArt, c) for key, c in pixart.PRESETS.items()},
    **{key: partial(dit.DiT, c) for key, c in dit.PRESETS.items()},
    **{key: partial(diffit.DiffiT, c) for key, c in diffit.PRESETS.items()},
    **{key: partial(vit.ViT, c) for key, c in vit.PRESETS.items()},
}
TEXT = 77  # CLIP's tokens


@dataclass(frozen=True)
class Work:
    """One prediction of a network: operations, the largest bytes of activations at once, tokens of the image."""

    operations: float
    activations: int
    tokens: int


def network_of(source: str, path: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network of a preset's or published name, or of a folder or file whose network has these tensors, without
    weights. ValueError for others."""
    name = PRESETS.get(source, source)
    with torch.device("meta"):
        if name in NETWORKS:
            return NETWORKS[name]()
        if (path / "unet" / "config.json").is_file():
            return unet.UNet(unet_config(read_json(path / "unet" / "config.json"), path))
        config = optional_json(path / "transformer" / "config.json")
        if str(config.get("_class_name", "")).startswith("PixArt"):
            return pixart.PixArt(pixart_config(config, path))
        if any(key.startswith(original_sd.UNET) for key in tensors):
            return unet.UNet(original_sd.recognise(tensors, original_sd.ORIGINALS, path).unet)
        if any(".attn.qkv_temb." in key for key in tensors):
            return diffit.DiffiT(diffit_config(tensors))
        if any(".adaLN_modulation." in key or ".class_embedder." in key for key in tensors):
            return load_dit(path, device="meta")
        if find_layout(tensors) is not None:
            return vit.ViT(read_vit(path, device="meta")[0])
    raise ValueError(
        f"No model {source!r} to plan: expected a folder or a file of FLUX.1, Stable Diffusion, "
        f"PixArt, DiT, DiffiT or ViT, or a name: {', '.join([*mmdit.PRESETS, *PRESETS, *NETWORKS])}."
    )


class Counted(Control):
    """Counts the operations of attention, which keeps no scores in memory."""

    def __init__(self) -> None:
        self.operations = 0

    def around(self, call: Call, attend: Attend) -> Tensor:
        (batch, heads, queries, dim), keys = call.q.shape, call.k.shape[2]
        self.operations += 4 * batch * heads * queries * keys * dim
        return torch.empty_like(call.q)


class Peak(TorchDispatchMode):
    """The most bytes of new tensors that are alive at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in (*network.parameters(), *network.buffers())}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@torch.no_grad()
def work_of(network: nn.Module, height: int, width: int, batch: int, dtype: torch.dtype) -> Work:
    """One prediction for images of `height` x `width` pixels. ValueError where they do not fit."""
    network, counted = network.to(dtype), Counted()
    config = cast("Any", network.config)
    side = 1 if isinstance(network, vit.ViT) else 8
    patch = getattr(config, "patch_size", 1)
    if height % (side * patch) or width % (side * patch) or min(height, width, batch) < 1:
        raise ValueError(f"height and width must be multiples of {side * patch}; found {height} x {width}.")
    channels = 3 if isinstance(network, vit.ViT) else config.in_channels
    with torch.device("meta"):
        x, t = torch.empty(batch, channels, height // side, width // side, dtype=dtype), torch.empty(batch)
        run: Callable[[], object]
        if isinstance(network, unet.UNet):
            text = torch.empty(batch, TEXT, config.cross_attention_dim, dtype=dtype)
            sizes = torch.empty(batch, 6) if config.addition_embed_type else None
            width = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
            pooled = None if sizes is None else torch.empty(batch, width, dtype=dtype)
            run = lambda: network(x, t, text, pooled=pooled, sizes=sizes, controls=[counted])  # noqa: E731
        elif isinstance(network, pixart.PixArt):
            text = torch.empty(batch, max(LIMITS.values()), config.caption_channels, dtype=dtype)
            size = torch.empty(batch, 2, dtype=dtype) if config.sized else None
            run = lambda: network(x, t, text, size=size, controls=[counted])  # noqa: E731
        elif isinstance(network, vit.ViT):
            run = lambda: network(x)  # noqa: E731
        else:
            labels = torch.empty(batch, dtype=torch.long)
            run = lambda: network(x, t, labels, controls=[counted])  # noqa: E731
        with FlopCounterMode(display=False) as flops, Peak(network) as memory:
            run()
    tokens = (height // side // patch) * (width // side // patch)
    return Work(flops.get_total_flops() + counted.operations, memory.peak, tokens)
