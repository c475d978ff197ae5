"""What the image attends to in a reference: the attention of an IP-Adapter (arXiv:2308.06721, Eq. 5), recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from condit.controls.control import Control, Where
from condit.controls.ip_reference import IPReference
from condit.controls.wrap import Wrapper, unwrapped
from condit.nn.attention import Attend, Call, Site


@dataclass(frozen=True)
class AttentionMaps(Wrapper):
    """A control that records, at the layers `where`, what the prompts' images attend to in its references; the images
    are those of the control itself.

        watched = AttentionMaps(ip.control("ref.png"), where="up_blocks.1.*")
        pipe("a fox", controls=[watched])
        watched.maps["up_blocks.1.attentions.0.transformer_blocks.0.attn2"][-1]  # of the last step

    maps: path of a layer -> for each step (B, N, T) on the CPU, the mean over heads of softmax(q K'^T / sqrt(d)): N
    image tokens, row by row, and T tokens of the references. Further calls append.
    """

    inner: Control
    where: Where | str | tuple[str, ...] | None = None
    maps: dict[str, list[Tensor]] = field(default_factory=dict)

    def around(self, call: Call, attend: Attend) -> Tensor:
        if call.image is not None and call.plain is not None:
            self.record(call.plain[:, :, call.image], call.site)
        return super().around(call, attend)

    def residual(self, site: Site, query: Tensor) -> Tensor | None:
        self.record(query, site)
        return super().residual(site, query)

    def record(self, q: Tensor, site: Site) -> None:
        """The attention of queries (B, H, N, D) to the references at a layer."""
        if site not in Where.of(self.where):
            return
        for control in unwrapped(self.inner):
            if isinstance(control, IPReference) and site.path in control.kv:
                k, _ = control.kv[site.path]
                map = (q.float() @ k.float().mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
                self.maps.setdefault(site.path, []).append(map.detach().cpu())

    def negative(self) -> Control | None:
        return self.inner.negative()

    def describe(self) -> dict:
        return self.inner.describe()
