"""diffusion/guidance.py: combining predictions."""

import torch

from condit.diffusion.guidance import guide, guide_text_image

BOTH, TEXT, NONE = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # another order of sums


def test_scale_one_is_the_conditional_and_zero_the_unconditional():
    close(guide(BOTH, NONE, 1.0), BOTH)
    assert torch.equal(guide(BOTH, NONE, 0.0), NONE)


def test_a_scale_moves_along_the_difference():
    close(guide(BOTH, NONE, 3.0) - NONE, 3 * (BOTH - NONE))


def test_equal_scales_of_text_and_image_are_one_guidance():
    close(guide_text_image(BOTH, TEXT, NONE, 4.0, 4.0), guide(BOTH, NONE, 4.0))


def test_image_scale_zero_leaves_text_guidance_alone():
    close(guide_text_image(BOTH, TEXT, NONE, 4.0, 0.0), guide(TEXT, NONE, 4.0))
