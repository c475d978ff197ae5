"""`condit verify`: comparisons with the recorded tensors and what a file of weights is."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from condit.backbones.diffit import DiffiT, DiffiTConfig
from condit.weights import catalog
from condit.weights.diffit import save_diffit


def test_verify_tells_one_wrong_number_among_the_recorded_ones_and_exits_1(run, tmp_path):
    golden = tmp_path / "golden"
    shutil.copytree(Path(__file__).parent.parent / "parity" / "golden" / "diffit", golden / "diffit")
    (golden / "dit").symlink_to(
        Path(__file__).parent.parent / "parity" / "golden" / "dit"
    )  # the recording's frequencies
    recorded = load_file(golden / "diffit" / "latent_a.safetensors")
    recorded["act.block.1"][0, 0, 0] += 1e-3
    save_file(recorded, golden / "diffit" / "latent_a.safetensors")
    code, out, err = run("verify", "diffit", "--golden", str(golden))
    assert (code, err) == (1, "")
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["LARGE", "1.0e-03", "ok", "ok", "ok", "ok"]
    assert "latent_a: block.1: 1.0e-03" in out


def test_verify_without_fixtures_or_with_a_file_of_another_model_is_a_clear_error(run, tmp_path):
    code, out, err = run("verify", "dit", "--golden", str(tmp_path / "absent"))
    assert (code, out) == (1, "")
    assert "Pass tests/parity/golden of a checkout" in err
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "x.safetensors")
    code, out, err = run("verify", "dit", "x.safetensors")
    assert (code, out) == (1, "")
    assert "It looks like a ViT" in err


def test_verify_takes_an_embedded_models_name_and_tells_what_else_it_is(run):
    assert "It looks like a FLUX transformer of diffusers" in run("verify", "dit", "tiny")[2]
    part = catalog.MODELS["tiny"].path / "transformer"  # its file bears a plain name where others bear fields
    assert "It looks like a FLUX transformer of diffusers" in run("verify", "diffit", str(part))[2]


def test_verify_tells_what_a_file_is_in_text_and_json(run, tmp_path):
    config = DiffiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    save_diffit(DiffiT(config), tmp_path / "x.safetensors")
    code, out, _ = run("verify", "diffit", "x.safetensors")
    assert code == 0
    assert "nearest DiffiT-XL/2: input_size 8 instead of 32, hidden_size 16 instead of 1152" in out
    report = json.loads(run("verify", "diffit", "x.safetensors", "--json")[1])
    assert (report["layout"], report["dtype"], report["differs"]["depth"]) == ("release", "float32", [2, 28])
    assert report["reference"] == {"note": "none: neither transformers nor diffusers has a DiffiT", "rows": []}
