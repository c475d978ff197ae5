"""The tiny UNets, image encoders and adapters of the fixtures of IP-Adapter and InstantStyle, as a pipeline to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from condit.backbones.unet import UNet, UNetConfig
from condit.controls.control import Control, Run, Step
from condit.diffusion.guidance import guide
from condit.diffusion.vp import Process, make_path
from condit.diffusion.vp_samplers import sample
from condit.encoders.image import CLIPImage
from condit.weights.catalog import AdapterFile, read_adapter
from condit.weights.clip_towers import load_image_encoder, load_text_tower

# Suggested by the fixtures' READMEs; latents of a trajectory reach 30.
TOKENS, CALL, TRAJECTORY = 1e-5, 2e-5, 1e-4


def unet_of(config: dict, file: Path) -> UNet:
    known = UNetConfig.__dataclass_fields__
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    unet = UNet(UNetConfig(**fields))
    unet.load_state_dict(load_file(file), strict=True)
    return unet.eval().requires_grad_(False)


def vision_of(config: dict, file: Path) -> CLIPImage:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    model.load_state_dict(load_file(file), strict=True)
    return CLIPImage(model.eval().requires_grad_(False))


@dataclass
class GoldenPipe:
    """What an adapter asks of a pipeline, over a UNet of the fixtures."""

    name: str
    folder: Path
    config: dict
    backbone: UNet
    image: CLIPImage | None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def head_dim(self) -> int:
        """Of the heads of a projector that has some; its tensors do not say."""
        return self.config["resampler"]["dim_head"] if self.config["resampler"] else 64

    def adapter_file(self, source, method: str) -> AdapterFile:
        return read_adapter(source, method)

    def image_encoder(self, folder) -> CLIPImage:
        return load_image_encoder(folder)

    def text_tower(self, folder=None):
        return None if folder is None else load_text_tower(folder)

    def describe_source(self, reference) -> list:
        return []

    def file(self, name: str) -> Path:
        return self.folder / f"{self.name}_{name}"

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.file(f"{name}.safetensors"))

    def run(self, batch: int, grid: tuple[int, int] = (16, 16)) -> Run:
        return Run(self.backbone, batch, grid, torch.zeros(batch, 0), None, 4)  # type: ignore[arg-type]

    def at_work(self, control: Control, batch: int, grid: tuple[int, int] = (16, 16)) -> list[Control]:
        acting = control.prepare(self.run(batch, grid)).at(Step(0, 1, 1.0))
        return [] if acting is None else [acting]

    @torch.no_grad()
    def predict(self, t: dict[str, Tensor], *controls: Control) -> Tensor:
        """The noise that the UNet predicts for the inputs of a fixture."""
        x = t["sample"]
        acting = [c for control in controls for c in self.at_work(control, len(x), (x.shape[2], x.shape[3]))]
        more = {"pooled": t["pooled"], "sizes": t["time_ids"]} if "pooled" in t else {}
        return self.backbone(x, t["timestep"].expand(len(x)).float(), t["text_embeds"], controls=acting, **more)

    @torch.no_grad()
    def ddim(self, t: dict[str, Tensor], *controls: Control) -> list[Tensor]:
        """The latents after each step of the official generate(): DDIM with guidance, one text for all rows."""
        settings, x = self.config["ddim"], t["init_latents"]
        process = Process.from_config(self.config["scheduler"])
        path = make_path(process, "ddim", settings["steps"])
        assert [int(i) for i in path.timesteps] == t["timesteps"].tolist()
        sides = []
        for name, given in (("", list(controls)), ("negative_", [c.negative() for c in controls])):
            more = {}
            if settings["time_ids"] is not None:
                sizes = torch.tensor([settings["time_ids"]], dtype=torch.float32)
                more = {"pooled": t[f"{name}pooled"].expand(len(x), -1), "sizes": sizes.expand(len(x), -1)}
            acting = [c for control in given if control is not None for c in self.at_work(control, len(x))]
            sides.append((t[f"{name}prompt_embeds"].expand(len(x), -1, -1), acting, more))

        def denoise(x: Tensor, step: Step) -> Tensor:
            times = torch.full((len(x),), step.time)
            both = [self.backbone(x, times, text, controls=acting, **more) for text, acting, more in sides]
            return guide(both[0], both[1], settings["guidance_scale"])

        kept: list[Tensor] = []
        sample(denoise, x, path, on_step=lambda i, x, x0: kept.append(x))
        return kept


@cache
def golden_pipe(folder: Path, tag: str) -> GoldenPipe:
    config = json.loads((folder / f"{tag}_config.json").read_text())
    unet = unet_of(config["unet"], folder / f"{tag}_unet.safetensors")
    return GoldenPipe(
        tag, folder, config, unet, vision_of(config["clip_vision"], folder / f"{tag}_clip_vision.safetensors")
    )
