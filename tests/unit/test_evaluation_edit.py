"""`condit evaluate edit`: which edits are chosen, what is measured, the suite at its smallest on the embedded model."""

import json

import pytest
import torch

from condit.controls.dit4edit import DiT4Edit
from condit.data.icons import IconWorld, sample_path
from condit.evaluation import edit


@pytest.fixture(scope="module")
def world() -> IconWorld:
    return IconWorld.open(sample_path())


@pytest.mark.parametrize("task", ["concept", "vendor"])
def test_an_edit_has_a_true_icon_of_the_same_vendor_or_of_the_same_concept(world, task):
    jobs = edit.choose_jobs(world, task, 12)
    assert len(jobs) == 12 and jobs == edit.choose_jobs(world, task, 12) != edit.choose_jobs(world, task, 12, seed=1)
    for job in jobs:
        source, truth = world.icons[job.source], world.icons[job.truth]
        assert source.split != "train"
        assert (source.style == truth.style) == (task == "concept") != (source.base == truth.base)
        assert job.source_prompt != job.target_prompt


def test_the_background_is_where_neither_icon_has_ink_and_its_figures_see_that_alone():
    source, truth = (torch.full((1, 3, 64, 64), 255, dtype=torch.uint8) for _ in range(2))
    source[..., :20, :20] = 0
    truth[..., 20:30, :20] = 0
    drawn = edit.ink(source, truth)
    assert drawn[0, :34, :24].all() and not drawn[0, 34:].any() and not drawn[0, :, 24:].any()
    background, changed = 1 - drawn.float(), source.clone()
    changed[..., :30, :20] = 100
    psnr, ssim = edit.background_figures(changed, source, background)
    assert psnr.item() == pytest.approx(60) and ssim.item() > 0.95  # SSIM looks over the border by its window
    changed[..., 40:, 40:] = 205
    assert edit.background_figures(changed, source, background)[0].item() < 30


def test_a_picture_has_no_structure_distance_to_itself_and_more_to_another():
    patches = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    s = edit.similarities(patches)
    assert torch.allclose(s.diagonal(dim1=1, dim2=2), torch.ones(2, 8))
    assert (s[0] - s[1]).square().mean() > 0.01
    assert torch.allclose(edit.similarities(3 * patches), s, atol=1e-6)


def test_the_photographs_are_squares():
    assert [image.size[0] == image.size[1] for image in edit.photographs()] == [True] * 4


@pytest.mark.slow
def test_the_suite_writes_every_figure_and_a_page(tmp_path, world):
    methods = {"unified": ((DiT4Edit(),), True)}
    result = edit.evaluate_edit(tmp_path, count=2, steps=2, trip_steps=(2,), methods=methods, tell=lambda text: None)
    assert json.loads((tmp_path / "edit.json").read_text()) == result
    tasks = {row["task"] for row in result["rows"]}
    assert tasks == {"concept", "vendor", "icons", "photographs"}
    cases = {row["case"] for row in result["rows"] if row["task"] == "concept"}
    assert cases == {"source, unchanged", "unified", "true icon"}
    assert all(row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9 for row in result["rows"])
    page = (tmp_path / "edit.html").read_text()
    assert page.count("<h2>") == 2 * 7 + 2 + 2 and (tmp_path / "sheets" / "vendor.png").is_file()
    with pytest.raises(ValueError, match="at least 1; found 0"):
        edit.evaluate_edit(tmp_path, count=0)
