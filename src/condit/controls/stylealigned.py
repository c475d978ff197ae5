"""StyleAligned: style aligned image generation via shared attention (Hertz et al. 2023, arXiv:2312.02133).

The image also attends to the keys and values that its reference has in a pass of its own; queries and keys first take
the statistics of the reference's. Nothing is trained. docs/papers/stylealigned.md says what is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condit.controls.reference_pass import Passed, at_places, image_places
from condit.nn.attention import Attend, Call


def adain(x: Tensor, reference: Tensor, dim: int | tuple[int, ...] = -2, eps: float = 1e-5) -> Tensor:
    """x with mean and deviation of the reference over `dim`, by channel (section 3.2; Huang & Belongie 2017, Eq. 8).
    The variance is unbiased and `eps` is added to it, as in the released code."""
    (mean, deviation), (mean_r, deviation_r) = (
        (y.mean(dim, keepdim=True), (y.var(dim, keepdim=True) + eps).sqrt()) for y in (x, reference)
    )
    return (x - mean) / deviation * deviation_r + mean_r


@dataclass(frozen=True)
class StyleAligned(Passed):
    """strength: the weight of the reference's keys in the softmax, e to the paper's shift of their scores: 1 is shift
    0, 2 the released log 2 for photographs. normalise: AdaIN of queries and keys. The rest: see `Passed`."""

    normalise: bool = True

    def around(self, call: Call, attend: Attend) -> Tensor:
        """Attention(AdaIN(Q, Q_r), [AdaIN(K, K_r); K_r], [V; V_r])."""
        places = image_places(call)
        if places is None or call.site.path not in self.memory or self.weight is None:
            return attend(call)
        (rows, columns), (q_r, k_r, v_r) = places, self.memory[call.site.path]
        if self.normalise:
            share = self.weight.clamp(max=1.0).to(call.q)  # so that a small strength changes little
            q, k = call.q[:, :, rows], call.k[:, :, columns]
            q, k = torch.lerp(q, adain(q, q_r), share), torch.lerp(k, adain(k, k_r), share)
            call = replace(call, q=at_places(call.q, rows, q), k=at_places(call.k, columns, k))
        # Text, which shares the softmax of an MM-DiT, does not attend to the reference.
        shift = call.q.new_full((1, 1, call.q.shape[2], 1), -torch.inf)
        shift[:, :, rows] = self.weight.log().to(shift)
        return attend(call.append_kv(k_r, v_r, shift))
