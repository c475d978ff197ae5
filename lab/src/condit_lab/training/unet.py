"""Training of the embedded UNet: SDXL's architecture on icons, v-prediction down to noise alone."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.unet import PRESETS, Resnet, Transformer, UNet
from condit.controls.control import Control
from condit.diffusion.vp import Process
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import TinyTextStates
from condit.nn.attention import Attend, Call
from condit.training.denoising import errors, latents_of
from condit.training.loop import Task
from condit.weights.files import load_strict, read_tensors, save_tensors
from condit.weights.folders import WEIGHTS, floats
from condit.weights.tiny import UNET_INDEX, latent_parts, load_clip
from condit.weights.vae import load_latent
from condit_lab.training.captioned import Captioned, CaptionedIcons
from condit_lab.training.teacher import Teacher

# Stable Diffusion's betas, stretched so that the last level is noise alone (arXiv:2305.08891): in a linear code the
# layout of an icon shows through Stable Diffusion's own last level. Uniform timesteps then have the noise levels of
# the embedded MM-DiT's training (docs/tiny.md).
PROCESS = Process(
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    set_alpha_to_one=True,
    rescale_betas_zero_snr=True,
)
SPEAKS = 0.25  # a quarter of eleven layers


class UNetTask(Task):
    """Text tower and autoencoder are those of a finished MM-DiT (`model`, its folder), and frozen. `init`: a folder of
    an earlier export that training starts from. taught_from: where there is more noise than that, noise / (noise +
    picture), the MM-DiT teaches (`Teacher`). 1: nowhere."""

    def __init__(
        self,
        icons: str,
        model: str,
        ui: str | None = None,
        *,
        preset: str = "tiny-unet",
        init: str | None = None,
        ui_share: float = 0.05,
        procedural_share: float = 0.05,
        taught_from: float = 1.0,
        silent: float = 0.0,
    ):
        super().__init__()
        self.data = CaptionedIcons.open(icons, ui, ui_share=ui_share, procedural_share=procedural_share)
        self.vae = load_latent(Path(model) / "vae").requires_grad_(False)
        self.text = TinyTextStates(*load_clip(Path(model) / "clip")).requires_grad_(False)
        self.teacher = Teacher(model, PROCESS, taught_from)
        self.unet = UNet(PRESETS[preset])
        start(self.unet)
        if init is not None:
            load_strict(self.unet, floats(read_tensors(Path(init) / "unet" / WEIGHTS)), source=init)
        if not 0 <= silent <= 1:
            raise ValueError(f"silent must be a share of the rows, from 0 to 1; found {silent}.")
        self.silent = silent
        self.parts = latent_parts(self.unet, self.text, self.vae, PROCESS, preset)

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Captioned:
        return self.data.batch(rng, size)

    def forward(self, batch: Captioned, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0, text = latents_of(self.vae, batch.images, generator), self.text(batch.captions)
        t = torch.randint(PROCESS.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        x0, noise = self.teacher(x0, noise, t, batch.captions)
        return errors(self.parts, x0, noise, t, text, self.silence(len(x0), generator)).mean(), {}

    def silence(self, count: int, generator: torch.Generator) -> list[Control]:
        """For a batch of `count` rows; none where every layer speaks for every row."""
        return [Silence.draw(self.unet, count, self.silent, generator)] if self.silent else []

    def validate(self) -> dict[str, float]:
        """Held-out combinations: the error at shares of the schedule, and how much it rises with another icon's
        caption, in %."""
        examples = self.data.examples()
        x0, right = latents_of(self.vae, examples.images.to(self.device), None), self.text(examples.captions)
        wrong = right.rows(torch.arange(len(x0)).roll(7).to(x0.device))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        figures = {}
        for share in (0.25, 0.5, 0.75, 0.9, 1.0):
            t = torch.full((len(x0),), round(share * (PROCESS.num_train_timesteps - 1)))
            good, bad = (float(errors(self.parts, x0, noise, t, text).mean()) for text in (right, wrong))
            figures[f"error_{share}"] = round(good, 4)
            figures[f"wrong_words_{share}"] = round(100 * (bad / good - 1), 1)
        return figures

    def sheet(self) -> Image.Image:
        pipe = Pipeline(self.parts)
        return self.data.sheet(lambda prompts: pipe(prompts, seed=0).images)

    def export(self, folder: Path, card: dict) -> None:
        """A folder that `condit.load` reads."""
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        (folder / "scheduler").mkdir(exist_ok=True)
        tensors = {k: v.half().contiguous() for k, v in self.unet.state_dict().items()}
        save_tensors(folder / "unet" / WEIGHTS, tensors, {"condit": "unet"})
        configs = {
            "model_index.json": UNET_INDEX,
            "unet/config.json": {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(self.unet.config)},
            "scheduler/scheduler_config.json": scheduler_config(PROCESS),
            "card.json": card,
        }
        for file, content in configs.items():
            (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Silence(Control):
    """Stochastic depth (arXiv:1603.09382) of the cross-attention: a layer that is silent for a row adds nothing to it,
    be it of the words or of a reference. First of the controls, so that it silences the others.

    A small network that may choose lets one layer do all the reading, the last before the top level. Layers that have
    to do without it at times learn to read too, so that a block filter has blocks to choose from (docs/tiny.md).
    """

    speaks: Mapping[str, Tensor]  # path of a layer -> 0 or 1 (B, 1, 1, 1)

    @classmethod
    def draw(cls, unet: UNet, count: int, share: float, generator: torch.Generator) -> Silence:
        """In `share` of `count` rows each layer speaks with probability SPEAKS, in the others all do."""
        paths = [site.path for site in unet.sites if site.kind == "cross"]
        whole = torch.rand(count, 1, generator=generator) >= share
        speaks = whole | (torch.rand(count, len(paths), generator=generator) < SPEAKS)
        return cls(
            dict(zip(paths, speaks.float().to(unet.conv_in.weight)[:, :, None, None, None].unbind(1), strict=True))
        )

    def rows(self, rows: slice) -> Silence:
        return Silence({path: speaks[rows] for path, speaks in self.speaks.items()})

    def around(self, call: Call, attend: Attend) -> Tensor:
        out = attend(call)
        return out * self.speaks[call.site.path].to(out) if call.site.path in self.speaks else out


def scheduler_config(process: Process) -> dict:
    """In diffusers' words; its ancestral sampler draws, whose fresh noise lets a small network mend what it drew."""
    return {"_class_name": "EulerAncestralDiscreteScheduler", **dataclasses.asdict(process)}


@torch.no_grad()
def start(unet: UNet) -> None:
    """As latent diffusion starts (its `zero_module`): what leaves a resnet, a transformer and the network is zero."""
    last = [m.conv2 for m in unet.modules() if isinstance(m, Resnet)]
    last += [m.proj_out for m in unet.modules() if isinstance(m, Transformer)]
    for module in (*last, unet.conv_out):
        for p in module.parameters():
            p.zero_()
