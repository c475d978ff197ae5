"""DiT and ViT: one forward against the plain float32 form, diffusers and transformers.

    python benchmarks/backbones.py [--device cuda] [--out benchmarks/results]

Weights are random: time does not depend on them. "plain" is the same network in float32 with softmax(QK^T)V written
out, as the original code has it, without compilation. Every form is set against the plain one and against the other
library's. A processor without bfloat16 arithmetic emulates it, slower by far; its rows say so. Sampling and training of
DiT-XL/2, and shares of the peak: dit_speed.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from timing import Timing, machine, measure, save, table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from condit.backbones.dit import PRESETS as DIT
from condit.backbones.dit import DiT
from condit.backbones.vit import PRESETS as VIT
from condit.backbones.vit import ViT
from condit.cli.memory import keep_memory
from condit.training.loop import fast_precision

Variants = dict[str, Callable[[], object]]
PLAIN = "plain, float32"


def bfloat16(device: str) -> str:
    """The name of the type, with a warning where the device only emulates it."""
    return "bfloat16 (emulated here)" if device == "cpu" and fast_precision() != "bf16" else "bfloat16"


@torch.no_grad()
def randomise(network: nn.Module) -> nn.Module:
    """Small weights everywhere, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return network.eval().requires_grad_(False)


def variants(network: nn.Module, arguments: tuple, device: str) -> Variants:
    """The forms of one network of ours. Floating arguments follow the dtype."""
    small = deepcopy(network).to(torch.bfloat16)

    def cast(dtype: torch.dtype) -> tuple:
        return tuple(a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in arguments)

    full, half = cast(torch.float32), cast(torch.bfloat16)
    compiled, compiled_small, half_name = torch.compile(network), torch.compile(small), bfloat16(device)

    def plain() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return network(*full)

    return {
        PLAIN: plain,
        "condit, float32": lambda: network(*full),
        "condit, float32, compiled": lambda: compiled(*full),
        f"condit, {half_name}": lambda: small(*half),
        f"condit, {half_name}, compiled": lambda: compiled_small(*half),
    }


def dit(name: str, batch: int, device: str) -> Variants:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    config = DIT[name]
    network = randomise(DiT(config)).to(device)
    x = torch.randn(batch, config.in_channels, *config.latent)
    t, y = torch.arange(batch) * 100, torch.arange(batch)
    other = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.latent[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    )
    other = randomise(other).to(device)
    given = x.to(device), t.to(device), y.to(device)
    theirs = {"diffusers, float32": lambda: other(given[0], timestep=given[1], class_labels=given[2])}
    return {**theirs, **variants(network, (x, t, y), device)}


def vit(name: str, batch: int, device: str) -> Variants:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    config = VIT[name]
    network = randomise(ViT(config)).to(device)
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    x = torch.randn(batch, 3, side, side)
    their_config = TheirConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        image_size=side,
        patch_size=config.patch_size,
        num_labels=config.classes,  # type: ignore[call-arg]
    )
    other = randomise(ViTForImageClassification(their_config)).to(device)
    shown = x.to(device)
    theirs = {"transformers, float32": lambda: other(shown)}
    return {**theirs, **variants(network, (x,), device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="*", help="DiT-S/2, ViT-B/16 or other presets")
    given = parser.parse_args()
    keep_memory()
    found: dict[str, dict[str, Timing]] = {}
    command = f"python benchmarks/backbones.py --device {given.device} --batch {given.batch}"
    pages = [f"`{command}` on {machine()}.", ""]
    for name in given.only or ["DiT-S/2", "ViT-B/16"]:
        make = dit if name in DIT else vit
        title = f"{name}, batch {given.batch}"
        with torch.inference_mode():
            found[title] = measure(make(name, given.batch, given.device), turns=given.turns)
        theirs = next(iter(found[title]))
        pages.append(table(title, found[title], PLAIN, theirs))
        print(pages[-1])
    save(given.out / "backbones.json", found)
    (given.out / "backbones.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
