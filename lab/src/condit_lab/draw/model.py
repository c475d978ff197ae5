"""The embedded MM-DiT as it is trained: linear RGBA code, text, FLUX's transformer; rectified flow on the clean latent
(x-prediction, loss on the velocity)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from condit.backbones.mmdit import MMDiT, MMDiTConfig
from condit.diffusion.guidance import guide
from condit.diffusion.objectives import add_noise, flow_loss, to_velocity
from condit.diffusion.samplers import FlowPath, euler
from condit.diffusion.schedules import flow_sigmas
from condit.diffusion.steps import Step
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.nn.streams import Stream, grid_ids
from condit_lab.draw.code import RgbaCode
from condit_lab.draw.sketch import Sketch, fit_basis, fit_sketch
from condit_lab.draw.text import TextStates, TrainedText
from condit_lab.training.text_to_image import start

GRID = (8, 8)  # tokens of a 128 px icon
Count = Annotated[int, Field(ge=1)]


class ModelConfig(BaseModel):
    """`[model]` of a recipe."""

    model_config = ConfigDict(extra="forbid")

    width: Count = 320
    double_blocks: Count = 2
    single_blocks: Count = 3
    components: Count = 80  # of a patch of 8 x 8 RGBA pixels
    looks: Count = 256  # numbers that say what a word looks like
    sketch_depth: Count = 3
    sketch_components: Count = 256  # principal components of whole drawings
    text_width: Count = 256
    text_layers: Count = 2
    text_tokens: Count = 16
    vocabulary: Count = 8000


def new_text(config: ModelConfig, tokenizer: ClipTokenizer) -> TrainedText:
    sketch = Sketch(
        len(tokenizer),
        width=config.looks,
        depth=config.sketch_depth,
        components=config.sketch_components,
        shape=(GRID[0] * GRID[1], 4 * config.components),
    )
    return TrainedText(tokenizer, sketch, width=config.text_width, layers=config.text_layers)


def transformer(config: ModelConfig) -> MMDiT:
    """FLUX's transformer for 64 tokens of 4 patches."""
    channels = 4 * config.components
    model = MMDiT(
        MMDiTConfig(
            in_channels=2 * channels,
            out_channels=channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=64,
            num_attention_heads=config.width // 64,
            joint_attention_dim=config.text_width,
            pooled_projection_dim=config.text_width,
            axes_dims_rope=(16, 24, 24),
        )
    )
    start(model)
    return model


class DrawModel(nn.Module):
    """Codes of drawings and caption ids in; loss, errors or drawings out."""

    def __init__(self, config: ModelConfig, code: RgbaCode, text: TrainedText):
        super().__init__()
        self.config, self.code, self.text = config, code, text
        self.transformer = transformer(config)
        self.ids: Tensor
        self.variance: Tensor
        self.register_buffer("variance", torch.ones(4 * config.components))
        self.register_buffer("ids", grid_ids(*GRID), persistent=False)

    def predict(self, x_t: Tensor, t: Tensor, words: TextStates) -> Tensor:
        """Clean tokens (B, 64, channels).

        The words say a mean, the sketch; with `variance` around it, x_t has a best estimate that sees one number at a
        time (Wiener's). The transformer reads x_t at unit variance, and predicts what is left, in units of that
        estimate's error: so it begins as the estimate (preconditioning as in EDM, arXiv:2206.00364, section 5).
        """
        level, spread = t[:, None, None], self.code.variance.repeat_interleave(4)
        x = torch.cat([x_t * ((1 - level) ** 2 * spread + level**2).rsqrt(), words.sketch.to(x_t)], -1)
        text_ids = torch.zeros(words.states.shape[1], 3, device=x_t.device)
        out = self.transformer(Stream(x, self.ids, t, words.pooled), words.states, text_ids).float()
        mean = words.sketch.to(x_t)
        total = (1 - level) ** 2 * self.variance + level**2
        estimate = mean + (1 - level) * self.variance / total * (x_t - (1 - level) * mean)
        return estimate + (self.variance / total).sqrt() * level * out

    @torch.no_grad()
    def fit_words(
        self,
        captions: Tensor,
        starts: Tensor,
        codes: Tensor,
        weights: Tensor,
        *,
        looks: bool = True,
        bf16: bool = False,
    ) -> None:
        """Fit the sketch, the looks of words (unless `looks` is False) and the variance of the codes around sketches.

        captions (C, L) and starts (n + 1,) as of `caption_table`; codes (n, tokens, channels); weights (n,), mean 1:
        how often each drawing is trained on; bf16: of the products.
        """
        sketch = self.text.sketch
        components = fit_basis(sketch, codes, weights)
        dtype = torch.bfloat16 if bf16 else torch.float32
        fit_sketch(sketch, captions, starts, components, weights, dtype=dtype)
        if looks:
            self.text.looks.copy_(sketch.words.weight / sketch.words.weight.square().mean().sqrt())
        total = torch.zeros_like(self.variance)
        for rows in torch.arange(len(codes)).split(2048):
            left = codes[rows].float() - sketch(captions[starts[rows]])
            total += (left.square() * weights[rows, None, None]).mean(1).sum(0)
        self.variance.copy_(total / len(codes))

    def forward(self, x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Velocity error (B,) at levels t (B,) under noise; x0 and noise (B, 64, channels), ids (B, L)."""
        return flow_loss(self.predict(add_noise(x0, noise, t), t, self.text(ids)), x0, noise, t, "x")

    @torch.no_grad()
    def draw(self, ids: Tensor, noise: Tensor, *, empty: Tensor, steps: int, guidance: float, shift: float) -> Tensor:
        """Planes (B, 4, H, W) from caption ids; noise (steps + 1, B, 64, channels): the start and each step's own."""
        words, none = self.text(ids), self.text(empty.expand(len(ids), -1))

        def velocity(x: Tensor, step: Step) -> Tensor:
            t = torch.full((len(x),), step.time, device=x.device)
            with_words, without = (to_velocity(self.predict(x, t, w).float(), x, t, "x") for w in (words, none))
            return guide(with_words, without, guidance)

        fresh = iter(noise)
        path = FlowPath(tuple(flow_sigmas(steps, shift=shift).tolist()))
        x = euler(velocity, next(fresh), path, eta=1.0, noise=lambda x: next(fresh))
        return self.code.decode(x, GRID)
