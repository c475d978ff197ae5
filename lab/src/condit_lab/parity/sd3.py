"""IP-Adapter of SD 3.5 (InstantX, SD3.5-Large-IP-Adapter) for one joint attention; condit has no SD 3 network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condit.controls.ip_projectors import TimeResampler
from condit.nn.attention import Call, Site, join_heads, sdpa, split_heads
from condit.nn.layers import RMSNorm
from condit.weights.ip_files import IPFile
from condit.weights.ip_projectors import projector_of


class ImageBranch(nn.Module):
    """lambda * softmax(q [k, k']^T / sqrt(d)) [v, v'] for one joint attention: q, k, v are the image's own, before
    their norms, under norms of the branch; k', v' are those of the reference's tokens."""

    def __init__(self, dim: int, heads: int, width: int, clock: int):
        """dim: of the tokens; width: of the layer; clock: of the projector's time embedding."""
        super().__init__()
        self.heads = heads
        self.norm_ip = nn.ModuleDict({"linear": nn.Linear(clock, 2 * dim)})
        self.to_k_ip, self.to_v_ip = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_ip_k = (RMSNorm(width // heads, eps=1e-6) for _ in range(3))

    def keys_values(self, tokens: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and clock (B, dim) of a step -> k', v', each (B, H, T, D)."""
        shift, scale = self.norm_ip["linear"](F.silu(clock))[:, None].chunk(2, -1)
        h = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.norm_ip_k(split_heads(self.to_k_ip(h), self.heads)), split_heads(self.to_v_ip(h), self.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, added: tuple[Tensor, Tensor], strength: Tensor) -> Tensor:
        """q, k, v (B, H, N, D) of the image -> what is added to its attention (B, N, H D)."""
        k_ip, v_ip = added
        call = Call(self.norm_q(q), torch.cat([self.norm_k(k), k_ip], 2), torch.cat([v, v_ip], 2), Site("", "joint", 0))
        return join_heads(sdpa(call)) * strength.to(v)


class SD3Adapter(nn.Module):
    """Projector and the branches of all layers, under diffusers' names `image_proj.*`, `ip_adapter.N.*`."""

    def __init__(self, projector: TimeResampler, branches: Mapping[int, ImageBranch]):
        super().__init__()
        self.image_proj = projector
        self.ip_adapter = nn.ModuleDict({str(number): branch for number, branch in branches.items()})

    def tokens(self, features: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, L, E), time (B,) in [0, 1000] -> tokens (B, T, C) and clock (B, dim) of that step."""
        return self.image_proj(features, t)


def sd3_adapter(file: IPFile, head_dim: int, projector_head_dim: int = 64) -> SD3Adapter:
    """From `read_layout`, InstantX's spelling or diffusers'. head_dim: of the backbone's heads."""
    projector = projector_of(file.projector, projector_head_dim)
    if not isinstance(projector, TimeResampler):
        raise ValueError(f"SD 3.5's adapters have a time-conditioned projector; found {type(projector).__name__}.")
    branches = {}
    for number, parts in file.layers.items():
        (width, dim), clock = parts["to_k_ip.weight"].shape, parts["norm_ip.linear.weight"].shape[1]
        branches[number] = ImageBranch(dim, width // head_dim, width, clock)
        branches[number].load_state_dict(parts, strict=True)
    return SD3Adapter(projector, branches)
