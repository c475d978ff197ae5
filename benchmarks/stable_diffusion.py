"""Stable Diffusion's UNet: one guided step (two rows of a batch) against diffusers, with text keys made once a run.

    python benchmarks/stable_diffusion.py [--device cuda] [--preset sd15] [--latent 32] [--out benchmarks/results]

Weights are random and shared by the two networks. "text in each step" projects the text's keys and values in every
call, as diffusers does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from timing import machine, measure, save, table

from condit.backbones.unet import PRESETS, UNet, UNetConfig
from condit.cli.memory import keep_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def networks(config: UNetConfig, device: str, dtype: torch.dtype) -> tuple[UNet2DConditionModel, UNet]:
    """diffusers' and ours, over the same random weights."""
    with torch.device("meta"):
        theirs, ours = UNet2DConditionModel(**asdict(config)), UNet(config)
    g = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    weights = {name: (0.02 * torch.randn(shape, generator=g)).to(device, dtype) for name, shape in shapes.items()}
    for network in (theirs, ours):
        network.load_state_dict(weights, strict=True, assign=True)
        network.eval().requires_grad_(False)
    return theirs, ours


def variants(config: UNetConfig, latent: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    theirs, ours = networks(config, device, dtype)
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x, text, t = randn(2, config.in_channels, latent, latent), randn(2, 77, config.cross_attention_dim), 500.0
    times, added, told = torch.full((2,), t, device=device), None, {}
    if config.addition_embed_type is not None:
        width = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2, device=device)
        told = {"pooled": randn(2, width), "sizes": sizes}
        added = {"text_embeds": told["pooled"], "time_ids": sizes}
    once = ours.text_keys_values(text)
    return {
        "diffusers": lambda: theirs(x, times, text, added_cond_kwargs=added, return_dict=False)[0],
        "condit, text in each step": lambda: ours(x, times, text, **told),
        "condit": lambda: ours(x, times, once, **told),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="sd15", choices=["sd15", "sd21", "sdxl"])
    parser.add_argument("--latent", type=int, default=32, help="side of the latent; 64 is SD 1.5's own, 128 SDXL's")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    keep_memory()
    title = f"{given.preset}, latent {given.latent}, {given.dtype}, 2 rows"
    with torch.inference_mode():
        calls = variants(PRESETS[given.preset], given.latent, given.device, DTYPES[given.dtype])
        found = {title: measure(calls, turns=given.turns, warm=1)}
    page = f"`python benchmarks/stable_diffusion.py` on {machine()}.\n\n" + table(title, found[title], "diffusers")
    print(page)
    save(given.out / "stable_diffusion.json", found)
    (given.out / "stable_diffusion.md").write_text(page)


if __name__ == "__main__":
    main()
