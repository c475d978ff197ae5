"""controls/omini_images.py: which cells of a picture are drawn."""

import numpy as np
import pytest
import torch

from condit.controls.control import Fill
from condit.controls.omini_images import generated_cells, hide, sample_generated_cells
from condit_lab.parity.omini_golden import from_official_mask


def test_one_white_pixel_makes_its_cell_drawn():
    mask = np.zeros((32, 48), np.uint8)
    mask[9, 40] = 255
    drawn = generated_cells(mask, (4, 6), 8)
    assert drawn.nonzero().tolist() == [[1, 5]]


def test_a_mask_of_one_pixel_a_cell_is_taken_as_it_is():
    given = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(generated_cells(given, (4, 6), 8), given)


@pytest.mark.parametrize(("value", "message"), [(0, "white in no cell of the 4 x 6"), (255, "white in every cell")])
def test_a_mask_that_leaves_nothing_to_do_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        generated_cells(np.full((32, 48), value, np.uint8), (4, 6), 8)


def test_the_hidden_part_of_an_image_is_black_and_the_rest_as_it_was():
    picture = np.random.default_rng(0).integers(1, 256, (8, 12, 3), dtype=np.uint8)
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = 255
    hidden = np.asarray(hide(picture, mask))
    assert not hidden[2:4, 4:6].any()
    hidden = hidden.copy()
    hidden[2:4, 4:6] = picture[2:4, 4:6]
    assert (hidden == picture).all()


def test_an_official_mask_is_indexed_by_column_and_marks_what_is_known():
    official = torch.ones(6, 4, dtype=torch.bool)  # (columns, rows)
    official[5, 1] = False
    assert from_official_mask(official).nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 5)])
def test_a_sampled_mask_leaves_something_to_draw_and_something_to_know(grid):
    """The official sampler lets a rectangle over everything pass: no noisy token, a loss of NaN."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = sample_generated_cells(grid, generator)
        assert drawn.shape == grid and 0 < int(drawn.sum()) < drawn.numel()


def test_half_of_the_sampled_masks_draw_a_rectangle_and_half_all_but_one():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        drawn = sample_generated_cells((5, 7), generator)
        rectangles = [is_rectangle(drawn), is_rectangle(~drawn)]
        assert any(rectangles)
        inside += rectangles[0] and not rectangles[1]
    assert 140 < inside < 260


def is_rectangle(cells: torch.Tensor) -> bool:
    rows, columns = cells.any(1).nonzero()[:, 0], cells.any(0).nonzero()[:, 0]
    return bool(cells[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all())


def test_the_same_generator_samples_the_same_mask():
    first, second = (sample_generated_cells((9, 9), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_one_cell_cannot_be_split():
    with pytest.raises(ValueError, match="1 x 1 is too small to keep one cell"):
        sample_generated_cells((1, 1), torch.Generator())


def test_an_image_is_completed_row_by_row_and_the_given_tokens_stay_as_they_were():
    drawn = torch.tensor([[True, False], [False, True]])
    fill = Fill(torch.zeros(1, 4, 3), drawn)
    whole = fill.complete(torch.arange(12.0).reshape(2, 2, 3))
    assert fill.cells.tolist() == [0, 3] and not fill.tokens.any()
    assert whole[1].tolist() == [[6, 7, 8], [0, 0, 0], [0, 0, 0], [9, 10, 11]]
