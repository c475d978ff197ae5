"""DiffiT's latent model (arXiv:2312.02139) against golden/diffit: tensors written by the official release. What is
compared, and how exactly: lab/src/condit_lab/parity/diffit.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condit.backbones.diffit import TMSA, DiffiTConfig
from condit.weights.diffit import save_diffit
from condit_lab.parity.check import difference, part
from condit_lab.parity.diffit import CHECKS, TOLERANCE, facts_of, load

GOLDEN = Path(__file__).parent / "golden" / "diffit"
FIXTURES = ["latent_a", "latent_b_constant_guidance"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_releases_tensors_are_reproduced(check):
    assert check.run(GOLDEN).exceeding() == []


def test_the_fixture_tells_offsets_of_the_wrong_sign():
    model, t = load(GOLDEN, "latent_a")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TMSA):  # offsets key minus query instead of query minus key
                module.relative_position_bias_table.copy_(module.relative_position_bias_table.flip(0))
        turned = model(t["input.x"], t["input.t"], t["input.y"])
    assert difference(turned, t["output.eps_sigma"]) > 10 * TOLERANCE


@pytest.mark.parametrize("name", FIXTURES)
def test_sizes_read_off_the_tensors_are_those_of_the_fixture(name):
    model, _ = load(GOLDEN, name)
    assert model.config == DiffiTConfig(**facts_of(GOLDEN, name)["config"])
    assert sum(p.numel() for p in model.parameters()) == facts_of(GOLDEN, name)["num_parameters"]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_saved_model_holds_the_release_tensors_bit_by_bit(name, tmp_path):
    model, t = load(GOLDEN, name)
    written = load_file(save_diffit(model, tmp_path / "again.safetensors", indices=True))
    released = part(t, "state.")
    assert written.keys() == released.keys()
    assert all(torch.equal(written[k], released[k]) and written[k].dtype == released[k].dtype for k in released)
