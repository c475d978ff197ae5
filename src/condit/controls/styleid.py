"""StyleID: style injection in diffusion (Chung et al. 2023, arXiv:2312.09008).

In the last self-attention layers an image looks up the keys and values of the style image; its queries stay near those
of the content image. Nothing is trained. docs/papers/styleid.md says what is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from condit.controls.control import Run, Where, finite
from condit.controls.host import Host
from condit.controls.reference_pass import (
    Memory,
    Passed,
    ReferencePass,
    Source,
    Trajectory,
    at_places,
    encode,
    image_places,
)
from condit.controls.stylealigned import adain
from condit.diffusion.steps import Step
from condit.nn.attention import Attend, Call


@dataclass(frozen=True)
class StyleID(Passed):
    """content: the image whose queries are preserved by `gamma` (Eq. 5), such as one that the same call generates
    without this control; None: nothing is. temperature: tau, the factor on the scores (Eq. 6). strength: the share of
    the injected output, 1 in the paper. The rest: see `Passed`; the reference is the style."""

    content: Source | None = None
    gamma: float = 0.75
    temperature: float = 1.5
    content_latents: Tensor | None = None
    kept: ReferencePass | None = None
    queries: Memory = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("strength", self.strength), ("gamma", self.gamma)):
            if not 0 <= finite(name, value) <= 1:
                raise ValueError(f"StyleID's {name} must be 0 to 1; found {value}.")
        if finite("temperature", self.temperature) <= 0:
            raise ValueError(f"StyleID's temperature must be above 0; found {self.temperature}.")

    @staticmethod
    def start(content: Trajectory, style: Trajectory) -> Tensor:
        """The initial latents (Eq. 8), for `latents=` of the call: the content's noise with the statistics by channel
        of the style's."""
        noise = content.trajectory[0]
        return adain(noise, style.trajectory[0], (2, 3) if noise.ndim == 4 else 1)

    def layers(self, backbone: nn.Module) -> Where:
        """Self-attention in the second half of a UNet's way up: decoder layers 7 to 12 of Stable Diffusion. Ours: the
        second half of a transformer's layers."""
        sites = [site.path for site in getattr(backbone, "sites", ()) if site.kind != "cross"]
        levels = len(getattr(getattr(backbone, "config", None), "block_out_channels", ()))
        late = tuple(f"up_blocks.{i}." for i in range(levels // 2, levels))
        return Where(tuple(path for path in sites if path.startswith(late)) or tuple(sites[len(sites) // 2 :]))

    def sized(self, size: tuple[int, int], pipe: Host) -> Self:
        latents = None if self.content is None else encode(self.content, size, pipe)
        return replace(super().sized(size, pipe), content_latents=latents)

    def prepare(self, run: Run) -> Self:
        # The content has the words of the image.
        kept = None if self.content is None else self.make_pass(run, self.content, self.content_latents, None)
        return replace(super().prepare(run), kept=kept)

    def at(self, step: Step) -> Self | None:
        acting = super().at(step)
        if acting is None or self.kept is None:
            return acting
        return replace(acting, queries=self.kept.record(step, Where.of(self.where)))

    def around(self, call: Call, attend: Attend) -> Tensor:
        """Attention(tau (gamma Q_c + (1 - gamma) Q), K_s, V_s), for the image."""
        places, path = image_places(call), call.site.path
        if places is None or path not in self.memory or self.weight is None:
            return attend(call)
        if call.merged is not None and call.bias is not None:
            raise ValueError("StyleID cannot act together with token merging and another control that appends keys.")
        (rows, columns), (_, k_s, v_s) = places, self.memory[path]
        # On the style's keys, the temperature leaves the scores of a text in the same softmax as they are.
        k, v = at_places(call.k, columns, self.temperature * k_s), at_places(call.v, columns, v_s)
        q = call.q
        if path in self.queries:
            kept = self.queries[path][0]
            kept = kept if call.merged is None else call.merged.merge(kept)
            q = at_places(q, rows, torch.lerp(q[:, :, rows], kept, self.gamma))
        plain, injected = attend(call), attend(replace(call, q=q, k=k, v=v))
        mixed = torch.lerp(plain[:, :, rows], injected[:, :, rows], self.weight.to(plain))
        return at_places(plain, rows, mixed)

    def describe(self) -> dict:
        gamma = None if self.content is None else self.gamma
        return {**super().describe(), "gamma": gamma, "temperature": self.temperature}
