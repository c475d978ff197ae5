"""verify: what is measured is told as it is, and files are known for what they are."""

import math
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from condit.backbones import diffit, dit, vit
from condit.weights.dit import save_dit
from condit.weights.vit import save_vit
from condit_lab.parity import fixtures
from condit_lab.parity.check import Check, CheckResult, difference, layout_differences
from condit_lab.parity.files import nearest, verify_file
from condit_lab.parity.fixtures import (
    SYSTEMS,
    find_golden,
    lines,
    markdown,
    round_up,
    unknown,
    verify_fixtures,
    write_between_marks,
)

ROOT = Path(__file__).parent.parent.parent
DIT = dit.DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
VIT = vit.ViTConfig(patch_size=4, image_size=16, dim=24, depth=2, heads=3, mlp_dim=40, classes=5)


def shaken(model: nn.Module) -> nn.Module:
    """No weight stays zero, so that every one of them shows in the output."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model.eval()


# Numbers


def row(**differences: float) -> CheckResult:
    return CheckResult("what", "against", 1e-5, {"case": differences})


def test_a_row_is_its_largest_difference():
    assert row(a=1e-6, b=1e-5).ok
    assert row(a=1e-6, b=1e-5).worst == "case: b"
    assert not row(a=1e-6, b=2e-5).ok
    assert row(a=1e-6, b=2e-5).exceeding() == ["case: b: 2.0e-05"]


@pytest.mark.parametrize("wrong", [row(a=0.0, b=math.nan), row(a=math.inf), row(), CheckResult("w", "a", 1.0, {})])
def test_what_cannot_be_compared_or_was_not_is_never_ok(wrong):
    assert wrong.measured == math.inf
    assert not wrong.ok


def test_another_shape_is_no_small_difference_and_relative_is_a_part_of_the_largest():
    assert difference(torch.zeros(1, 2), torch.zeros(2)) == math.inf
    assert math.isnan(difference(torch.tensor([math.nan]), torch.zeros(1)))
    assert difference(torch.tensor([0.0, 101.0]), torch.tensor([0.0, 100.0]), relative=True) == pytest.approx(0.01)
    assert difference(torch.zeros(2), torch.zeros(2), relative=True) == 0


def test_layouts_differ_by_names_on_either_side_and_by_shapes():
    expected = {"a": [2], "b": [3], "c": [4]}
    layout = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}
    assert layout_differences(layout, expected) == {"names": 2, "shapes": 1}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (2.31e-6, "2.4e-6"), (2.4e-6, "2.4e-6"), (9.91e-8, "1.0e-7"), (math.inf, "inf")]
)
def test_numbers_are_rounded_up(value, text):
    assert round_up(value) == text


def test_a_failing_row_names_everything_beyond_its_tolerance():
    text = lines([("DiT", row(a=1e-6, b=2e-5)), ("DiT", row(a=0.0))])
    assert text[1].endswith("2.0e-5    1e-5       TOO LARGE")
    assert text[2] == "    case: b: 2.0e-05"
    assert text[3].endswith("0         1e-5       ok")


# Fixtures


def test_every_fixture_in_the_folder_is_compared_with():
    golden = find_golden()
    assert golden == ROOT / "tests" / "parity" / "golden"
    assert {folder.name for folder in golden.iterdir()} == {system.folder for system in SYSTEMS.values()}
    for name, system in SYSTEMS.items():
        assert unknown(name, golden / system.folder) == []
        assert all(check.cases(golden / system.folder) for check in system.checks)
        for check in system.checks:  # nothing that a check compares is a mere input of it
            cases = check.cases(golden / system.folder)
            inputs = [case for case in cases if any(fnmatch(case, pattern) for pattern in system.inputs)]
            assert not inputs or check.what in ("image encoder", "UNet without an adapter"), check.what


@pytest.mark.parametrize("name", ["omini", "ip-adapter", "instantstyle", "deadiff", "dit4edit"])
def test_a_recorded_value_that_is_wrong_or_that_nothing_computes_fails_its_row(tmp_path, name):
    system = SYSTEMS[name]
    golden = find_golden() / system.folder
    check, file, tensor, more = SPOILT[name]
    folder = tmp_path / system.folder
    folder.mkdir()
    for given in golden.iterdir():
        (folder / given.name).symlink_to(given)
    if system.folder != "dit":
        (tmp_path / "dit").symlink_to(find_golden() / "dit")  # the frequencies of the recording
    tensors = load_file(golden / file)
    (folder / file).unlink()
    wrong = tensors | {tensor: tensors[tensor] + 1e-3 * tensors[tensor].abs().max()}
    wrong |= {more: tensors[tensor]} if more else {}
    save_file(wrong, folder / file)
    (row,) = [c.run(folder) for c in system.checks if c.what == check]
    assert {line.split(": ")[1] for line in row.exceeding()} == {tensor, more} - {""}


# System -> a check, a file, a tensor of it; a name that no case computes, where names do not tell their settings.
SPOILT = {
    "omini": ("one prediction, 13 kinds of conditions", "forward.safetensors", "out/aligned", "out/more"),
    "ip-adapter": (
        "regions, two images, two adapters",
        "sd15_regional_diffusers.safetensors",
        "two_adapters",
        "two_more",
    ),
    "instantstyle": (
        "UNet with every preset at every strength",
        "sd15_global_blocks.safetensors",
        "style/scale_0.5",
        "",
    ),
    "deadiff": ("UNet in every mode", "unet_io.safetensors", "out.both.w1.0", ""),
    "dit4edit": ("merged and unmerged tokens", "token_merge.safetensors", "0.merged_value", "0.merged_more"),
}


def test_without_fixtures_the_error_names_their_folder_in_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(fixtures, "__file__", str(tmp_path / "site-packages" / "condit" / "verify" / "fixtures.py"))
    with pytest.raises(FileNotFoundError, match="does not contain. Run this in a checkout, or pass"):
        find_golden()


def test_a_folder_may_hold_some_kinds_only_but_no_unknown_one(tmp_path):
    (tmp_path / "vit").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has none of vit_\*\.safetensors"):
        verify_fixtures("vit", tmp_path)
    shutil.copy(find_golden() / "vit" / "posembed_resize.json", tmp_path / "vit" / "posembed_resize_b.json")
    shutil.copy(
        find_golden() / "vit" / "posembed_resize.safetensors", tmp_path / "vit" / "posembed_resize_b.safetensors"
    )
    (result,) = verify_fixtures("vit", tmp_path)
    assert result.ok and list(result.cases) == ["posembed_resize_b"]
    (tmp_path / "vit" / "swin.json").write_text("{}")
    with pytest.raises(ValueError, match="no check compares swin"):
        verify_fixtures("vit", tmp_path)


def test_the_table_of_the_parity_page_is_the_commands():
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    table = page.partition("<!-- verify -->\n")[2].partition("<!-- /verify -->\n")[0]

    def rows(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]

    golden = find_golden()

    def unmeasured(folder: Path, check: Check) -> CheckResult:
        return CheckResult(check.what, check.against, check.tolerance, {case: {} for case in check.cases(folder)})

    written = rows(
        markdown({n: [unmeasured(golden / s.folder, check) for check in s.checks] for n, s in SYSTEMS.items()})
    )
    assert [cells[:4] + cells[5:6] for cells in rows(table)] == [cells[:4] + cells[5:6] for cells in written]
    assert all(re.fullmatch(r"0|equal|\d\.\de-\d+", cells[-1]) for cells in rows(table)[2:])


def test_a_table_is_written_between_its_marks_or_not_at_all(tmp_path):
    page, table = tmp_path / "page.md", markdown({"dit": [row(a=2.31e-6)]})
    page.write_text("before\n<!-- verify -->\nold\n<!-- /verify -->\nafter\n", encoding="utf-8")
    write_between_marks(page, table)
    assert page.read_text(encoding="utf-8") == f"before\n<!-- verify -->\n{table}<!-- /verify -->\nafter\n"
    assert table.endswith("| DiT | what | against | 1 | 1 | 1e-5 | 2.4e-6 |\n")
    page.write_text("before\n<!-- verify -->\nold\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table"):
        write_between_marks(page, table)


# Files


@pytest.mark.parametrize(
    ("config", "presets", "name", "differs"),
    [
        (replace(vit.PRESETS["ViT-L/16"], image_size=384), vit.PRESETS, "ViT-L/16", {"image_size": (384, 224)}),
        (replace(vit.PRESETS["ViT-B/16"], flavour=vit.FLAVOURS["timm"]), vit.PRESETS, "ViT-B/16", {}),
        (dit.PRESETS["DiT-XL/2-512"], dit.PRESETS, "DiT-XL/2-512", {}),
        (replace(diffit.PRESETS["DiffiT-XL/2"], depth=30), diffit.PRESETS, "DiffiT-XL/2", {"depth": (30, 28)}),
    ],
)
def test_the_nearest_preset_differs_in_the_fewest_sizes(config, presets, name, differs):
    assert nearest(config, presets) == (name, differs)


@pytest.mark.parametrize("layout", ["npz", "linen", "timm", "transformers"])
def test_a_vit_of_every_layout_equals_transformers(layout, tmp_path):
    model = shaken(vit.ViT(VIT))
    report = verify_file("vit", str(save_vit(tmp_path / "x.npz", VIT, model.state_dict(), layout=layout)))
    assert (report.layout, report.preset, report.dtype) == (layout, "ViT-Ti/16", "float32")
    assert report.reference.rows[0].ok
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_a_vit_that_transformers_cannot_represent_raises(tmp_path):
    config = replace(VIT, classifier="gap", class_token=False)
    path = save_vit(tmp_path / "x.npz", config, vit.ViT(config).state_dict(), layout="npz")
    reference = verify_file("vit", str(path)).reference
    assert reference.note.startswith("none: transformers' ViT has a class token")
    assert reference.rows == ()


def test_a_dit_folder_equals_diffusers_where_its_timestep_features_do(tmp_path):
    model = shaken(dit.DiT(DIT))
    assert isinstance(model, dit.DiT)
    report = verify_file("dit", str(save_dit(model, tmp_path / "transformer", layout="diffusers")))
    assert report.layout == "diffusers"
    assert report.reference.rows[0].ok
    assert "at t = 500, because" in report.reference.note


@pytest.mark.parametrize("layout", ["official", "training"])
def test_other_dit_files_have_no_reference_and_may_need_their_heads(layout, tmp_path):
    path = str(save_dit(dit.DiT(DIT), tmp_path / "x.pt", layout=layout))
    report = verify_file("dit", path, heads=4)
    assert (report.layout, report.reference.rows) == (layout, ())
    with pytest.raises(ValueError, match="does not give its number of heads"):
        verify_file("dit", path)
