"""Training of the embedded PixArt (Chen et al. 2023, arXiv:2310.00426) on icons, with v-prediction.

PixArt's linear betas already stand for much noise: half of the timesteps have more than 3.4 parts of noise on one of
picture. A linear code needs that, as it shows its layout until late (docs/tiny.md).
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from condit.backbones.pixart import PRESETS, PixArt
from condit.diffusion.vp import Process
from condit.drawing.pipeline import Pipeline
from condit.encoders.text import Text, TinyTextStates
from condit.training.denoising import errors, latents_of
from condit.training.loop import Task
from condit.weights.files import load_strict, read_tensors, save_tensors
from condit.weights.folders import WEIGHTS, floats
from condit.weights.tiny import PIXART_INDEX, latent_parts, load_clip
from condit.weights.vae import load_latent
from condit_lab.training.captioned import Captioned, CaptionedIcons
from condit_lab.training.teacher import Teacher, alpha_sigma
from condit_lab.training.unet import scheduler_config

# Of PixArt's scheduler all but the prediction: v, since a token of noise is half as wide as the network.
PROCESS = Process.from_config({"prediction_type": "v_prediction"})
LEVELS = (0.2, 0.5, 0.7, 0.9, 0.98)  # noise / (noise + picture)


class PixArtTask(Task):
    """Text tower and autoencoder are those of a finished MM-DiT (`model`, its folder), and frozen. `init`: a folder of
    an earlier export that training starts from.

    taught_from: where there is more noise than that, noise / (noise + picture), the MM-DiT teaches (`Teacher`). 1:
    nowhere.
    """

    def __init__(
        self,
        icons: str,
        model: str,
        *,
        preset: str = "pixart-tiny",
        init: str | None = None,
        procedural_share: float = 0.06,
        taught_from: float = 1.0,
    ):
        super().__init__()
        self.data = CaptionedIcons.open(icons, procedural_share=procedural_share)
        self.teacher = Teacher(model, PROCESS, taught_from)
        self.words, self.vae = TinyTextStates(*load_clip(Path(model) / "clip")), load_latent(Path(model) / "vae")
        self.requires_grad_(False)
        self.transformer = PixArt(PRESETS[preset])
        start(self.transformer)
        self.parts = latent_parts(self.transformer, self.words, self.vae, PROCESS, preset)
        if init is not None:
            load_strict(self.transformer, floats(read_tensors(Path(init) / "transformer" / WEIGHTS)), source=init)

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def compiled(self) -> list[nn.Module]:
        return [self.transformer]

    def batch(self, rng: random.Random, size: int) -> Captioned:
        return self.data.batch(rng, size)

    def forward(self, batch: Captioned, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            x0, words = latents_of(self.vae, batch.images, generator), self.words(batch.captions)
            t = torch.randint(PROCESS.num_train_timesteps, (len(x0),), generator=generator)
            noise = torch.randn(x0.shape, generator=generator).to(x0.device)
            x0, noise = self.teacher(x0, noise, t, batch.captions)
        return errors(self.parts, x0, noise, t, words).mean(), {}

    def validate(self) -> dict[str, float]:
        """Held-out combinations: the error of the velocity in the flow's units, as task text-to-image tells it, at
        levels of noise, and how much it rises with another icon's caption (in %)."""
        examples = self.data.examples()
        x0, right = latents_of(self.vae, examples.images.to(self.device), None), self.words(examples.captions)
        wrong = right.rows(torch.arange(len(x0), device=x0.device).roll(7))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        figures = {}
        for level in LEVELS:
            good, bad = (float(self.error(x0, noise, level, words)) for words in (right, wrong))
            figures[f"error_{level}"] = round(good, 4)
            figures[f"wrong_words_{level}"] = round(100 * (bad / good - 1), 1)
        return figures

    def error(self, x0: Tensor, noise: Tensor, level: float, words: Text) -> Tensor:
        """At the first timestep with so much noise, 0-d."""
        ratios = (1 / PROCESS.alphas_cumprod - 1).sqrt()
        t = torch.searchsorted(ratios / (1 + ratios), level).expand(len(x0))
        a, s = alpha_sigma(PROCESS, t, x0)
        # An error of x0 is sigma times that of v, and the flow's velocity is (x - x0) / level with its own x.
        return (errors(self.parts, x0, noise, t, words) * (a + s).flatten().square()).mean()

    def sheet(self) -> Image.Image:
        pipe = Pipeline(self.parts)
        return self.data.sheet(lambda prompts: pipe(prompts, seed=0).images)

    def export(self, folder: Path, card: dict) -> None:
        """A folder that `condit.load` reads."""
        for part in ("transformer", "scheduler"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half().contiguous() for k, v in self.transformer.state_dict().items()}
        save_tensors(folder / "transformer" / WEIGHTS, tensors, {"condit": "transformer"})
        config = {"_class_name": PIXART_INDEX["transformer"], **dataclasses.asdict(self.transformer.config)}
        configs = {
            "model_index.json": PIXART_INDEX,
            "transformer/config.json": config,
            "scheduler/scheduler_config.json": scheduler_config(PROCESS),
            "card.json": card,
        }
        for file, content in configs.items():
            (folder / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def start(model: PixArt) -> None:
    """Matrices by Glorot's rule, as DiT's; what the text adds and the head start at zero."""
    for name, p in model.named_parameters():
        if ".attn2.to_out." in name or name.startswith("proj_out."):
            p.zero_()
        elif name.endswith("weight") and p.ndim > 1:
            nn.init.xavier_uniform_(p.flatten(1))
        elif name.endswith("bias"):
            p.zero_()
