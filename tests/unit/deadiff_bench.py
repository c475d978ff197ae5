"""A small UNet with what DEADiff's adapter asks of a pipeline."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control, Run, Step
from condit.controls.deadiff import DEADiff
from condit.controls.host import Host
from condit.data.images import to_tensor
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.qformer import QFormerConfig
from condit.weights.catalog import read_adapter

WIDTH = 64  # one head of 64, as heads are told from widths in files


def make_unet(**config) -> UNet:
    torch.manual_seed(0)
    small = UNetConfig(
        block_out_channels=(8, 8, 16, 16), attention_head_dim=2, cross_attention_dim=WIDTH, norm_num_groups=4
    )
    return UNet(replace(small, **config)).eval().requires_grad_(False)


def make_tower() -> ClipPatches:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    c = CLIPVisionConfig(
        hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=16, patch_size=8
    )
    whole = CLIPVisionModel(c).state_dict()
    # As in the published file: the last block and the norm after it are gone.
    kept = {n: v for n, v in whole.items() if not n.startswith(("encoder.layers.1.", "post_layernorm."))}
    return ClipPatches.of(kept)


FIRST = Step(0, 2, 1.0)
QFORMER = QFormerConfig(
    queries=4, width=WIDTH, layers=2, heads=1, hidden=32, image_width=64, vocabulary=30523, positions=8
)


class Bench:
    """What an adapter asks of a pipeline, over a UNet of some ten thousand weights."""

    name = "bench"

    def __init__(self, unet: UNet):
        self.backbone, self.device, self.dtype = unet, torch.device("cpu"), torch.float32
        self.image = None

    def adapter_file(self, source, method):
        return read_adapter(source, method)

    def read_images(self, source, annotator) -> Tensor:
        return to_tensor(source, (64, 64))[None]

    def describe_source(self, reference) -> list:
        return ["given"]

    def encode_text(self, prompts):
        g = torch.Generator().manual_seed(len(prompts[0]))
        return SimpleNamespace(tokens=torch.randn(len(prompts), 5, WIDTH, generator=g))

    @torch.no_grad()
    def draw(self, controls: list[Control], batch: int = 1, step: Step = FIRST) -> Tensor:
        g = torch.Generator().manual_seed(3)
        x, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 5, WIDTH, generator=g)
        x, text = x.expand(batch, -1, -1, -1), text.expand(batch, -1, -1)
        run = Run(self.backbone, batch, (8, 8), text, None, 4)  # type: ignore[arg-type]
        active = [c for c in (control.prepare(run).at(step) for control in controls) if c is not None]
        return self.backbone(x, torch.full((batch,), 300.0), text, controls=active)


def make_adapter(bench: Bench) -> DEADiff:
    torch.manual_seed(2)
    adapter = DEADiff.new(bench.backbone, QFORMER, make_tower(), pipe=cast("Host", bench))
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return adapter.eval().requires_grad_(False)


def make_pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 24, 20, 3), dtype=np.uint8))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
