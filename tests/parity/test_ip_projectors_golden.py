"""IP-Adapter's projectors, recognised by their tensors; what they compute: condit_lab/parity/ip_adapter.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condit.controls.ip_projectors import (
    FullProjection,
    IdentityPlusProjection,
    IdentityProjection,
    ImageProjection,
    Resampler,
)
from condit.weights.ip_projectors import projector_of

T = load_file(Path(__file__).parent / "golden" / "ip_adapter" / "projections.safetensors")
CASES = {
    "image_proj": ImageProjection,
    "mlp_full": FullProjection,
    "resampler": Resampler,
    "resampler_posemb_meanpool": Resampler,
    "faceid_mlp": IdentityProjection,
    "faceid_plus": IdentityPlusProjection,
    "faceid_plus_v2": IdentityPlusProjection,
}


@pytest.mark.parametrize("case", CASES)
def test_a_projector_is_recognised_by_its_tensors(case):
    prefix = f"{case}/weights/"
    weights = {name.removeprefix(prefix): t for name, t in T.items() if name.startswith(prefix)}
    projector = projector_of(weights, head_dim=8)  # the fixture's Perceivers; FaceID-Plus always has heads of 64
    assert type(projector) is CASES[case]
    assert all(torch.equal(t, weights[name]) for name, t in projector.state_dict().items())


def test_a_shortcut_tells_the_two_versions_of_faceid_plus_apart():
    prefix = "faceid_plus_v2/weights/"
    projector = projector_of({n.removeprefix(prefix): t for n, t in T.items() if n.startswith(prefix)})
    given = T["faceid_plus_v2/in0"], T["faceid_plus_v2/in1"]
    with torch.no_grad():
        assert not torch.allclose(projector(*given), projector(*given, 0.7), atol=1e-2)


def test_tensors_of_no_projector_raise():
    with pytest.raises(ValueError, match="no projector known here.*found 'weird.weight'"):
        projector_of({"weird.weight": torch.zeros(2, 2)})
    linear = {"proj.weight": torch.zeros(8, 3), "norm.weight": torch.zeros(4), "norm.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match="1 tensors do not fit \\(first: 'proj.bias', expected \\(8,\\), found None"):
        projector_of(linear)
    resampler = {n.removeprefix("resampler/weights/"): t for n, t in T.items() if n.startswith("resampler/weights/")}
    with pytest.raises(ValueError, match="inner width 24 has no heads of 64"):
        projector_of(resampler)
