"""DEADiff against numbers of the released code (golden/deadiff/README.md). What is compared, and how exactly:
lab/src/condit_lab/parity/deadiff.py.
"""

from pathlib import Path

import pytest
import torch

from condit.encoders.clip_patches import resize_antialiased
from condit.weights.deadiff import IMAGE_MAP, join, split
from condit_lab.parity.deadiff import CHECKS, published_qformer, published_unet

FOLDER = Path(__file__).parent / "golden" / "deadiff"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_the_released_tensors_are_reproduced(check):
    assert check.run(FOLDER).exceeding() == []


def test_published_names_come_back_bit_by_bit():
    published = published_qformer(FOLDER)
    back = join(split(published))
    twin = {n.replace("style_blip", "content_blip"): v for n, v in published.items() if ".visual_encoder." in n}
    assert back.keys() == {*published, *twin}
    assert all(torch.equal(back[name], value) for name, value in (published | twin).items())


def test_the_image_maps_are_all_that_a_unet_of_deadiff_has_more():
    published = published_unet(FOLDER)
    assert split(published).base.keys() == {name for name in published if not IMAGE_MAP.fullmatch(name)}


@pytest.mark.parametrize("size", [(300, 90), (90, 300), (224, 500), (226, 224)])
def test_the_antialias_blurs_both_axes_as_soon_as_one_shrinks(size):
    """By hand, in float64: the same kernel and border rule written as one dense two-dimensional sum."""
    images = torch.rand(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernels = []
    for side in size:
        sigma = max((side / 224 - 1) / 2, 0.001)
        width = int(max(4 * sigma, 3))
        width += width % 2 == 0
        weights = torch.tensor(
            [pow(2.718281828459045, -((i - width // 2) ** 2) / (2 * sigma**2)) for i in range(width)]
        )
        kernels.append((weights / weights.sum()).double())
    dense = torch.outer(*kernels)[None, None].expand(2, 1, -1, -1)
    margin = [len(k) // 2 for k in kernels]
    padded = torch.nn.functional.pad(images, (margin[1], margin[1], margin[0], margin[0]), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, dense, groups=2)
    expected = torch.nn.functional.interpolate(blurred, size=(224, 224), mode="bicubic", align_corners=True)
    torch.testing.assert_close(resize_antialiased(images, (224, 224)), expected, rtol=0, atol=1e-6)
