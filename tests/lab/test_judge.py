"""The style judge: what it sees, what it may learn from, and the one that comes with the package."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from condit.rulers.judge import Judge, frame, load_judge, to_input
from condit_lab.icons.world import STYLES, TRAIN_LICENCES, Icon
from condit_lab.suites import judge as judges
from condit_lab.suites.judge import is_for_judge

ICON = Icon("noto", "cat", "1F408", "1F408", "cat", "animals-nature", "train", True, "Apache-2.0")


def drawing(corner, side):
    """A square with a hole on white, (128, 128, 3)."""
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[corner : corner + side, corner : corner + side] = (200, 30, 30)
    third = side // 3
    picture[corner + third : corner + 2 * third, corner + third : corner + 2 * third] = 255
    return picture


def test_framing_hides_place_and_size():
    near, far = frame(drawing(4, 48)), frame(drawing(20, 96))
    assert near.shape == (64, 64, 3)
    # Resampling softens the borders by a pixel.
    assert (np.abs(near.astype(int) - far).max(-1) > 60).mean() < 0.05


def test_a_speck_does_not_move_the_frame():
    dirty = drawing(30, 60)
    dirty[2, 2] = 0
    assert np.array_equal(frame(dirty), frame(drawing(30, 60)))


def test_a_blank_image_stays_white():
    assert (frame(np.full((128, 128, 3), 255, np.uint8)) == 255).all()


def test_white_is_zero_as_padding_is():
    assert to_input(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)).abs().max() == 0


def test_the_judge_learns_from_training_icons_only():
    assert is_for_judge(ICON)
    assert not any(is_for_judge(replace(ICON, split=split)) for split in ("combo", "concept", "style+concept"))


def test_about_half_of_the_never_trained_style_is_kept_from_the_judge():
    kept = [is_for_judge(replace(ICON, split="style", base=f"{i:X}")) for i in range(1000)]
    assert 400 < sum(kept) < 600


def test_a_saved_judge_gives_the_same_probabilities(tmp_path):
    torch.manual_seed(0)
    judge = Judge(["a", "b", "c"]).eval()
    judge.load_state_dict({n: x.half().float() if x.is_floating_point() else x for n, x in judge.state_dict().items()})
    judges.save(judge, {"steps": 1}, tmp_path)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    again = load_judge(tmp_path)
    assert again.styles == ["a", "b", "c"]
    assert torch.equal(again.probabilities(images), judge.probabilities(images))


def test_a_style_that_is_not_a_candidate_has_probability_zero():
    torch.manual_seed(0)
    judge = Judge(["a", "b", "c"]).eval()
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    open_to_all, without_b = judge.probabilities(images), judge.probabilities(images, ["a", "c"])
    assert (without_b[:, 1] == 0).all()
    torch.testing.assert_close(without_b[:, 0] / without_b[:, 2], open_to_all[:, 0] / open_to_all[:, 2])
    torch.testing.assert_close(without_b.sum(1), torch.ones(2))


def test_a_missing_judge_raises_with_how_to_train_one(tmp_path):
    with pytest.raises(ValueError, match="condit_lab.suites.judge"):
        load_judge(tmp_path)


def test_the_committed_judge_knows_the_styles_of_the_training_licences_and_is_small():
    judge = load_judge()
    card = json.loads((judges.JUDGE / "card.json").read_text())
    assert card["styles"] == judge.styles == sorted(s for s, row in STYLES.items() if row.licence in TRAIN_LICENCES)
    assert set(card["licences"]) <= set(TRAIN_LICENCES)
    assert (judges.JUDGE / judges.WEIGHTS).stat().st_size < 1_000_000
    assert card["held_out"]["accuracy"] >= 0.70
