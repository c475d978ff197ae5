"""A random SD 1.x and a random SDXL in diffusers' pipelines and in condit's, and adapters for both."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import condit
from condit.controls.control import Control
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_projectors import Resampler
from condit.controls.style_lora import StyleLoRA
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage
from condit.nn.lora import LoRA, linear_shapes
from condit.weights.files import save_tensors

diffusers: Any = importlib.import_module("diffusers")  # its names are made when they are asked for
PROMPTS = ["a red fox", "in the snow"]
GIVEN: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
LEFT = np.zeros((32, 32), np.uint8)
LEFT[:, :16] = 255
every_kind = pytest.mark.parametrize("kind", ["sd15", "sdxl"])


def encoder() -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=12)
    return CLIPImage(shaken(CLIPVisionModelWithProjection(config).eval(), 0.3))


def shaken(module: Any, scale: float) -> Any:
    """With noise on every weight, so that nothing hides behind a zero or a one."""
    with torch.no_grad():
        for p in module.requires_grad_(False).parameters():
            p.add_(scale * torch.randn(p.shape))
    return module


@dataclass(frozen=True)
class Pair:
    """diffusers' pipeline and condit's over equal weights, files of adapters, and the towers that they read with."""

    theirs: Any
    ours: Pipeline
    files: dict[str, Path]
    image: CLIPImage
    tower: Any
    adapters: dict[int, tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    def host(self, name: str, **parts: Any) -> Any:
        """Another pipeline of diffusers over the same parts, or others."""
        given = {k: v for k, v in (self.theirs.components | parts).items() if v is not None}
        made = getattr(diffusers, name)
        how = {} if "XL" in name else {"safety_checker": None, "feature_extractor": None}
        host = made(**{**given, **how}, **({} if "XL" in name else {"requires_safety_checker": False}))
        host.set_progress_bar_config(disable=True)
        return host

    def controls(self, pipe: Any, name: str, references: Any, **how: Any) -> list[Control]:
        """Of adapters loaded for `pipe`, a guest or condit's pipeline."""
        if name == "all":
            parts = [("global", {"strength": 0.6, "mask": LEFT}), ("style", {}), ("deadiff", {}), ("lora", {})]
            return [c for part, given in parts for c in self.controls(pipe, part, references, **given, **how)]
        adapter = self.adapter(pipe, name)
        if name == "lora":
            return [adapter.control(0.7)]
        given = {"content": references} if name == "deadiff" else {"reference": references}
        return [adapter.control(**given, **how)]

    def adapter(self, pipe: Any, name: str) -> Any:
        """Loaded once for each pipe: a guest borrows its network anew for each adapter."""
        _, loaded = self.adapters.setdefault(id(pipe), (pipe, {}))  # with the pipe, so that its id stays its own
        if name not in loaded:
            loaded[name] = self.load(pipe, name)
        return loaded[name]

    def load(self, pipe: Any, name: str) -> Any:
        if name == "lora":
            return StyleLoRA.load(self.files["lora"], pipe)
        if name == "deadiff":
            return condit.DEADiff.load(self.files["deadiff"], pipe, image_encoder=self.tower)
        if name == "style":
            return condit.InstantStyle.load(self.files["global"], pipe, preset="style", image_encoder=self.image)
        return IPAdapter.load(self.files[name], pipe, image_encoder=self.image, head_dim=8)


@pytest.fixture(scope="session")
def sd_pairs(make_sd, make_deadiff, tmp_path_factory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp("models")
        theirs = make_sd(kind)
        theirs.save_pretrained(folder / kind)
        ours = condit.load(folder / kind)
        width = ours.backbone.config.cross_attention_dim
        with torch.random.fork_rng():
            torch.manual_seed(1)
            image = encoder()
            projector = Resampler(16, 8, width, inner=8, heads=1, depth=1, hidden=16, queries=3)
            adapters: dict[str, Any] = {
                "global": IPAdapter.new(ours, IPConfig(12, 3, width)),
                "plus": IPAdapter.new(ours, IPConfig(16, 3, width, feature="hidden"), projector=projector),
                "lora": LoRA(linear_shapes(ours.backbone, ("to_q", "ff.net.2", "proj_in")), 2),
            }
            tensors = {name: shaken(adapter, 0.3).tensors() for name, adapter in adapters.items()}
        tensors["lora"] = {n.replace("transformer.", "unet.", 1): t for n, t in tensors["lora"].items()}
        files = {name: save_tensors(folder / name, weights) for name, weights in tensors.items()}
        deadiff = make_deadiff(ours)
        config = {"condit": deadiff.metadata()}
        files["deadiff"] = save_tensors(folder / "deadiff", deadiff.tensors(), config)
        made[kind] = Pair(theirs, ours, files, image, deadiff.tower)
        return made[kind]

    return get


def noise(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, prompts: str | Sequence[str] = PROMPTS[0], **given: Any) -> Tensor:
    """Latents of either pipeline or of a guest."""
    start = noise(1 if isinstance(prompts, str) else len(prompts))
    return pipe(prompts, **{"latents": start, **GIVEN, **given}).images


def close(actual: Tensor, expected: Tensor) -> None:
    # Sums in another order, over a few guided steps of a network that amplifies; values reach 10.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


# What diffusers brings along


class Present(Control):
    """Does nothing, but acts: the prediction is condit's."""

    def around(self, call, attend):
        return attend(call)

    def negative(self) -> Control:
        return self
