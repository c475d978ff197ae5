"""Training of the embedded UNet: SDXL's architecture on icons, v-prediction down to noise alone."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.unet import PRESETS, Resnet, Transformer, UNet
from condit.diffusion.vp import Process
from condit.latent_pipeline import LatentPipeline
from condit.training.captioned import Captioned, CaptionedIcons
from condit.training.denoising import errors, latents_of
from condit.training.loop import Task
from condit.weights.files import load_strict, read_tensors, save_tensors
from condit.weights.tiny import WEIGHTS, floats, load_latent, load_text
from condit.weights.tiny_unet import INDEX, unet_parts

# Stable Diffusion's betas, stretched so that the last level is noise alone (arXiv:2305.08891): in a linear code the
# layout of an icon shows through Stable Diffusion's own last level. Uniform timesteps then have the noise levels of
# the embedded MM-DiT's training (docs/tiny.md).
PROCESS = Process(
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    set_alpha_to_one=True,
    rescale_betas_zero_snr=True,
)


class UNetTask(Task):
    """Text, canvas and autoencoder are those of a finished MM-DiT (`model`, its folder), and frozen. `init`: a folder
    of an earlier export that training starts from."""

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
    ):
        super().__init__()
        self.data = CaptionedIcons.open(icons, ui, ui_share=ui_share, procedural_share=procedural_share)
        self.vae = load_latent(Path(model) / "vae").requires_grad_(False)
        self.text = load_text(Path(model)).requires_grad_(False)
        self.unet = UNet(PRESETS[preset])
        start(self.unet)
        if init is not None:
            load_strict(self.unet, floats(read_tensors(Path(init) / "unet" / WEIGHTS)), source=init)
        self.parts = unet_parts(self.unet, self.text, self.vae, PROCESS, preset)

    def compiled(self) -> list[nn.Module]:
        return [self.unet]

    def batch(self, rng: random.Random, size: int) -> Captioned:
        return self.data.batch(rng, size)

    def forward(self, batch: Captioned, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0, text = latents_of(self.vae, batch.images, generator), self.text(batch.captions)
        t = torch.randint(PROCESS.num_train_timesteps, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        return errors(self.parts, x0, noise, t, text).mean(), {}

    def validate(self) -> dict[str, float]:
        """Held-out combinations: the error at shares of the schedule, and how much it rises with another icon's
        caption, in %."""
        examples = self.data.examples()
        x0, right = latents_of(self.vae, examples.images.to(self.device), None), self.text(examples.captions)
        wrong = right.rows(torch.arange(len(x0)).roll(7).to(x0.device))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        found = {}
        for share in (0.25, 0.5, 0.75, 0.9, 1.0):
            t = torch.full((len(x0),), round(share * (PROCESS.num_train_timesteps - 1)))
            good, bad = (float(errors(self.parts, x0, noise, t, text).mean()) for text in (right, wrong))
            found[f"error_{share}"] = round(good, 4)
            found[f"wrong_words_{share}"] = round(100 * (bad / good - 1), 1)
        return found

    def sheet(self) -> Image.Image:
        pipe = LatentPipeline(self.parts)
        return self.data.sheet(lambda prompts: pipe(prompts, seed=0).images)

    def export(self, folder: Path, card: dict) -> None:
        """A folder that `condit.load` reads."""
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        (folder / "scheduler").mkdir(exist_ok=True)
        tensors = {k: v.half().contiguous() for k, v in self.unet.state_dict().items()}
        save_tensors(folder / "unet" / WEIGHTS, tensors, {"condit": "unet"})
        configs = {
            "model_index.json": INDEX,
            "unet/config.json": {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(self.unet.config)},
            "scheduler/scheduler_config.json": scheduler_config(PROCESS),
            "card.json": card,
        }
        for file, content in configs.items():
            (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
