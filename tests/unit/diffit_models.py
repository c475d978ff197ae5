"""Random weights for DiffiT, and controls that show where they act."""

import torch
from torch import Tensor

from condit.controls.control import Control
from condit.nn.attention import Attend, Call, Site


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Noise on every weight: a fresh final layer is zero and would hide everything."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model.eval()


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)  # another order of sums


class Double(Control):
    """Twice the attention output at one site."""

    def __init__(self, path: str):
        self.path, self.seen = path, []

    def around(self, call: Call, attend: Attend) -> Tensor:
        self.seen.append((call.site.path, call.q.shape, call.bias is not None))
        return attend(call) * (2 if call.site.path == self.path else 1)


class Add(Control):
    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        return torch.ones(query.shape[0], query.shape[2], query.shape[1] * query.shape[3]) if site.index == 1 else None
