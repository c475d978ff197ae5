"""DEADiff (arXiv:2403.06951): what a reference costs in a step of the UNet, and once before it.

    python benchmarks/deadiff.py [--full] [--device cuda] [--out benchmarks/results]

Ratios to a prediction without a control, in the same run with the same random weights. By default a UNet of Stable
Diffusion's layers at a fifth of its width and 256 px, for one CPU core; `--full`: Stable Diffusion 1.5's size at 512 px
in float16.
"Projected in every step" is what the released code does: W_k', W_v' run again in each of 50 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import Timing, machine, measure, save, table
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.cli.memory import keep_memory
from condit.controls.control import Run, Step
from condit.controls.deadiff import Acts, DEADiff, DEADiffReference
from condit.controls.deadiff_layers import Name
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import BERT_WORDS, QFormerConfig

PLAIN = "no control"


@dataclass(frozen=True)
class Setting:
    """A UNet with its adapter and the inputs of one prediction."""

    unet: UNet
    adapter: DEADiff
    x: Tensor
    t: Tensor
    text: dict
    tokens: dict
    picture: Tensor


def setting(*, full: bool, device: str, cells: int) -> Setting:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    dtype = torch.float16 if full else torch.float32
    config = UNetConfig() if full else UNetConfig(block_out_channels=(64, 128, 256, 256))
    unet = UNet(config).to(device, dtype).eval()
    blocks = 24 if full else 4
    sizes: Any = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 224}
    vision: Any = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=blocks, patch_size=14)).eval()
    readers = QFormerConfig() if full else QFormerConfig(layers=2)
    adapter = DEADiff.new(unet.float(), readers, ClipPatches(vision).to(device)).to(device).eval()
    unet.to(dtype)
    x = torch.randn(1, 4, cells, cells, device=device, dtype=dtype)
    text = unet.text_keys_values(torch.randn(1, 77, 768, device=device, dtype=dtype))
    tokens = {name: torch.randn(1, 16, 768, device=device) for name in BERT_WORDS}
    picture = torch.rand(1, 3, 224, 224, device=device) * 2 - 1
    return Setting(unet, adapter, x, torch.tensor([500.0], device=device), text, tokens, picture)


def acting(s: Setting, strength: dict[Name, float] | None = None, weighed: Acts = "keys-values") -> DEADiffReference:
    """A control of style and content, at a step."""
    cells = s.x.shape[-1]
    run = Run(s.unet, 1, (cells, cells), s.x, None, 4)  # type: ignore[arg-type]
    reference = replace(s.adapter.reference(s.tokens, strength=strength), weighed=weighed)
    control = reference.prepare(run).at(Step(0, 50, 1.0))
    assert control is not None
    return control


def variants(s: Setting) -> dict[str, Callable[[], Tensor]]:
    """A prediction in every form, and what happens once a reference."""

    def predict(control: DEADiffReference | None) -> Tensor:
        return s.unet(s.x, s.t, s.text, controls=() if control is None else (control,))

    made, weighed = acting(s), acting(s, weighed="attention", strength={"style": 0.7, "content": 0.7})
    return {
        PLAIN: lambda: predict(None),
        "style and content, K', V' made once": lambda: predict(made),
        "the same, m as a weight of the attention": lambda: predict(weighed),
        "the same, projected in every step": lambda: predict(acting(s)),
        "reading a reference, once: tower and both Q-Formers": lambda: read(s),
        "making K', V', once": lambda: next(iter(acting(s).kv.values()))[0],
    }


def read(s: Setting) -> Tensor:
    image = s.adapter.tower(s.picture)
    return torch.cat([s.adapter.ask(name, image) for name in ("style", "content")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.5's size, float16, on an accelerator")
    parser.add_argument("--device", help="default: cuda with --full, else cpu")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    device = given.device or ("cuda" if given.full else "cpu")
    with torch.inference_mode():
        s = setting(full=given.full, device=device, cells=64 if given.full else 32)
        found: dict[str, Timing] = measure(variants(s), turns=given.turns)
    title = f"DEADiff, {'Stable Diffusion 1.5, 512 px' if given.full else 'a fifth of its width, 256 px'}"
    page = f"`python benchmarks/deadiff.py{' --full' if given.full else ''}` on {machine()}.\n\n"
    page += table(title, found, PLAIN)
    print(page)
    save(given.out / "deadiff.json", {title: found})
    (given.out / "deadiff.md").write_text(page)


if __name__ == "__main__":
    main()
