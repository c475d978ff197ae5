"""`condit evaluate edit`: which edits are chosen, what is measured, the suite at its smallest on the embedded model."""

import json
from pathlib import Path

import pytest
import torch

from condit.controls.dit4edit import DiT4Edit
from condit_lab.icons.world import IconWorld, sample_path
from condit_lab.suites import edit
from condit_lab.suites.claims import KIND
from condit_lab.suites.edit import KEPT
from condit_lab.suites.edit_claims import CLAIMS, edit_claims
from condit_lab.suites.edit_rows import difference, differences
from condit_lab.suites.edit_trips import PHOTOS, TRIP, merging_time, round_trips, show_trips
from condit_lab.suites.pages import names


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


def test_an_image_has_no_structure_distance_to_itself_and_more_to_another():
    patches = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    s = edit.similarities(patches)
    assert torch.allclose(s.diagonal(dim1=1, dim2=2), torch.ones(2, 8))
    assert (s[0] - s[1]).square().mean() > 0.01
    assert torch.allclose(edit.similarities(3 * patches), s, atol=1e-6)


def test_photographs_are_squares_first_whole_then_windows_in_other_places():
    images, prompts = edit.photographs(12)
    assert all(image.size[0] == image.size[1] for image in images)
    assert prompts[:4] == list(PHOTOS.values()) and prompts == prompts[:4] * 3
    assert images[4].width == images[8].width < images[0].width / 2
    assert images[4].tobytes() != images[8].tobytes()


def test_a_difference_is_of_the_same_images():
    values = {"a": torch.tensor([1.0, 5.0, 9.0]), "b": torch.tensor([0.0, 4.0, 8.0])}
    (row,) = differences("task", "measure", values, ["x", "y", "z"], [("a", "b"), ("a", "c")])
    assert row.case == "a minus b" and (row.value, row.low, row.high, row.n) == (1.0, 1.0, 1.0, 3)


def test_round_trips_compare_solvers_step_by_step(make_pipe, make_pixart):
    pipe = make_pixart(make_pipe(blocks=1))
    images, prompts = edit.photographs(4)
    rows = round_trips(pipe, "photographs", images, prompts, (2, 4), lambda text: None)
    cases = {row.case for row in rows if row.measure == TRIP}
    assert "dpmpp2m, 2 steps, 2 network calls" in cases and "fixed_point, 4 steps, 12 network calls" in cases
    differences = {case for case in cases if " minus " in case}
    name = "{}, {} steps, {} network calls"
    pairs = ((2, 2), (2, 4), (4, 4))
    assert differences == {difference(name.format("dpmpp2m", a, a), name.format("first_order", b, b)) for a, b in pairs}
    sheet = show_trips(pipe, images, prompts, 2)
    assert sheet.width > sheet.height
    times = merging_time(pipe, 2, lambda text: None)
    assert [row.case for row in times] == ["unified", "unified, merging 50 %", "unified, merging 50 % minus unified"]
    assert all(row.value > 0 and row.n == 2 for row in times[:2])
    assert not merging_time(make_pipe(blocks=1), 2, lambda text: None)


def test_claims_are_of_the_embedded_models_and_of_what_was_measured():
    row = {"measure": KEPT, "value": 40.0, "low": 39.0, "high": 41.0, "n": 48, "task": "concept"}
    rows = [{**row, "case": case} for case in ("unified", "cross-attention", "unified minus cross-attention")]
    result = {"model": "tiny", "rows": rows, "steps": 10, "command": "condit evaluate edit"}
    claims = edit_claims(result)
    assert claims.keys() == {"dit4edit-unified/tiny", "dit4edit-merging/tiny"}
    assert "| background PSNR, dB, concept: unified minus cross-attention | 40.000 |" in claims["dit4edit-unified/tiny"]
    with pytest.raises(ValueError, match="Leave --claims out"):
        edit_claims({**result, "model": "elsewhere"})


def test_the_page_has_a_place_for_every_claim():
    page = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
    assert set(CLAIMS) <= set(names(page, KIND))


@pytest.mark.slow
def test_the_suite_writes_every_figure_and_a_page(tmp_path, world):
    methods = {"unified": ((DiT4Edit(),), True)}
    result = edit.evaluate_edit(tmp_path, count=2, steps=2, trip_steps=(2,), methods=methods, tell=lambda text: None)
    assert json.loads((tmp_path / "edit.json").read_text()) == result
    tasks = {row["task"] for row in result["rows"]}
    assert tasks == {"concept", "vendor", "icons", "photographs"}  # the embedded MM-DiT has no steps of more tokens
    cases = {row["case"] for row in result["rows"] if row["task"] == "concept"}
    assert cases == {"source, unchanged", "unified", "true icon"}
    assert all(row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9 for row in result["rows"])
    page = (tmp_path / "edit.html").read_text()
    assert page.count("<h2>") == 2 * 7 + 2 * 2 + 4 and (tmp_path / "sheets" / "vendor.png").is_file()
    with pytest.raises(ValueError, match="at least 1; found 0"):
        edit.evaluate_edit(tmp_path, count=0)
