"""backbones/mmdit.py: the weights that a strength puts on scores. Numbers: tests/parity."""

import pytest
import torch
from torch import Tensor

from condit.backbones.joint_attention import MMDiTContext, image_rows, score_bias
from condit.nn.streams import Stream, groups

TEXT, IMAGE, CONDITION = 2, 3, 1
REGION = torch.tensor([[1.0, 0.5, 0.0]])  # of the noisy image's three tokens; text takes the mean, 0.5


def stream(weight: Tensor) -> Stream:
    empty = torch.zeros(1, 0)
    return Stream(empty, empty, empty, empty, sees="main", log_weight=weight)


def context(weight: Tensor, *, merged: bool) -> tuple[MMDiTContext, list[Tensor]]:
    """Text, image and a condition as in the double blocks, or text and image as one stream as in the single ones."""
    given = [None, stream(weight)] if merged else [None, None, stream(weight)]
    grouped = groups(None if merged else 0, 0 if merged else 1, given)
    lengths = [TEXT + IMAGE, CONDITION] if merged else [TEXT, IMAGE, CONDITION]
    keys = [torch.zeros(1, 2, n, 4) for n in lengths]
    image = (0, TEXT) if merged else (1, 0)
    return MMDiTContext((), (), (), tuple(grouped), None if merged else 0, image, (), ()), keys


@pytest.mark.parametrize("merged", [False, True])
def test_the_weight_of_a_token_acts_in_both_directions(merged):
    given, keys = context(REGION.log(), merged=merged)
    main, own = (score_bias(group, keys, given) for group in given.groups)
    assert main is not None and own is not None
    each = torch.tensor([0.5, 0.5, 1.0, 0.5, 0.0])
    rows = torch.cat([torch.ones(5, 5), each[:, None]], 1)
    torch.testing.assert_close(main[0, 0].exp(), rows)
    torch.testing.assert_close(own[0, 0].exp(), torch.cat([each, torch.ones(1)])[None])


@pytest.mark.parametrize("merged", [False, True])
def test_one_weight_needs_one_row(merged):
    given, keys = context(torch.tensor(0.5).log(), merged=merged)
    main, own = (score_bias(group, keys, given) for group in given.groups)
    assert main is not None and own is not None
    torch.testing.assert_close(main.exp(), torch.tensor([1, 1, 1, 1, 1, 0.5])[None, None, None])
    torch.testing.assert_close(own.exp(), torch.tensor([0.5] * 5 + [1])[None, None, None])


def test_rows_of_the_image_are_separate_from_text_and_condition():
    given, _ = context(torch.tensor(0.5).log(), merged=False)
    x = torch.zeros(1, 0)
    apart = [Stream(x, x, x, x, log_weight=torch.tensor(0.5).log(), weight_text=False, sees="main")]
    text, image, own = groups(0, 1, [None, None, *apart])
    assert image_rows(given.groups[0], [TEXT, IMAGE], given) == slice(2, 5)
    assert image_rows(text, [TEXT], given) == slice(0, 0)
    assert image_rows(image, [IMAGE], given) == slice(0, 3)
    assert image_rows(own, [CONDITION], given) is None
