"""Batches of paired pictures from the icon world and from a folder of groups."""

import json
import random
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from condit.backbones.unet import UNet
from condit.data.grouped import PAIR_KINDS
from condit.data.pairs import open_pairs
from condit.encoders.clip_patches import resize_antialiased
from condit.encoders.text import Text
from condit.training.paired import cropped, open_folder
from condit.weights.latent_models import Frame, tell_unet
from condit_lab.training.icon_batches import IconSet
from condit_lab.training.referenced import NAMELESS
from condit_lab.training.sources import IconSource
from few_icons import few_icons


@pytest.fixture(scope="module")
def source() -> IconSource:
    return IconSource(IconSet.open(few_icons()), (64, 64), 32)


def test_icons_of_a_pair_share_what_their_kind_names_and_no_icon_is_its_own_reference(source):
    rng, icons = random.Random(0), source.icons.icons
    for kind in ("style", "content"):
        for i in source.rows[kind][:200]:
            one, other = icons[i], icons[source.partner(rng, kind, i)]
            same = one.style == other.style, one.base == other.base
            assert same == ((True, False) if kind == "style" else (False, True))


def test_every_partner_is_drawn(source):
    i, rng = source.rows["style"][0], random.Random(0)
    one = source.icons.icons[i]
    able = {j for j in source.icons.by_style[one.style] if source.icons.icons[j].base != one.base}
    assert {source.partner(rng, "style", i) for _ in range(30 * len(able))} == able


def test_a_batch_has_targets_references_and_captions_at_their_sizes(source):
    for kind in PAIR_KINDS:
        batch = source.batch(random.Random(1), kind, 3)
        assert batch.images.shape == (3, 3, 64, 64) and batch.references.shape == (3, 3, 32, 32)
        assert len(batch.captions) == 3 and all(batch.captions) and batch.kind == kind
        again = source.batch(random.Random(1), kind, 3)
        assert torch.equal(again.images, batch.images) and again.captions == batch.captions
    same = source.batch(random.Random(1), "reconstruction", 3)
    small = torch.nn.functional.avg_pool2d(same.images, 2)
    torch.testing.assert_close(same.references, small, rtol=0, atol=1e-6)


def test_captions_leave_to_the_reference_what_it_shows(source):
    rng, rows = random.Random(0), source.rows["content"]
    style = [source.caption(rng, "style", rows[n % len(rows)]) for n in range(200)]
    content = [source.caption(rng, "content", rows[n % len(rows)]) for n in range(200)]
    nameless = sum(caption.startswith(NAMELESS) for caption in content)
    assert 60 < nameless < 140 and not any(caption.startswith(NAMELESS) for caption in style)


def test_icons_without_pairs_raise():
    icons = IconSet.open(few_icons())
    alone = IconSet(icons.icons[:1], icons.concepts, icons.rgba[:1])
    with pytest.raises(ValueError, match="no style pair"):
        IconSource(alone, (64, 64), 32)


@pytest.fixture
def folder(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 20, 40, 3), dtype=np.uint8)
    rows = []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        groups = {"style_group": f"s{i % 2}", "content_group": f"c{i // 2}"}
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"t{i}", **groups}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path, pictures


def test_targets_of_a_folder_are_cropped_and_references_resized_as_released(folder):
    path, pictures = folder
    source = open_folder(open_pairs(path), (16, 16), 8)
    batch = source.batch(random.Random(0), "reconstruction", 4)
    for image, reference, caption in zip(batch.images, batch.references, batch.captions, strict=True):
        whole = torch.from_numpy(pictures[int(caption[1])]).movedim(-1, 0)[None].float() / 127.5 - 1
        torch.testing.assert_close(reference[None], resize_antialiased(whole, (8, 8)), rtol=0, atol=1e-6)
        # Beyond two cells from the cut, what Pillow saw outside of the crop no longer counts.
        middle = Image.fromarray(pictures[int(caption[1])][:, 10:30]).resize((16, 16), Image.Resampling.LANCZOS)
        cropped = torch.from_numpy(np.array(middle)).movedim(-1, 0).float() / 127.5 - 1
        torch.testing.assert_close(image[..., 3:-3], cropped[..., 3:-3], rtol=0, atol=0.02)


PARTNERS = {"style": {0: 2, 1: 3, 2: 0, 3: 1}, "content": {0: 1, 1: 0, 2: 3, 3: 2}}


@pytest.mark.parametrize(("kind", "partners"), PARTNERS.items())
def test_pairs_of_a_folder_follow_its_groups(folder, kind, partners):
    path, pictures = folder
    batch = open_folder(open_pairs(path), (16, 16), 8).batch(random.Random(0), kind, 12)
    for caption, reference in zip(batch.captions, batch.references, strict=True):
        whole = torch.from_numpy(pictures[partners[int(caption[1])]]).movedim(-1, 0)[None].float() / 127.5 - 1
        torch.testing.assert_close(reference[None], resize_antialiased(whole, (8, 8)), rtol=0, atol=1e-6)


def test_the_network_receives_the_crop_of_each_row():
    wide, whole = cropped((100, 200), (64, 64)), cropped((64, 64), (64, 64))
    assert wide == Frame((64, 64), (100, 200), (0, 32), (64, 64)) and whole.crop == (0, 0)
    seen = {}

    class Network:
        config = SimpleNamespace(addition_embed_type="text_time")

        def text_keys_values(self, tokens):
            return {}

        def __call__(self, x, t, text, **more):
            seen.update(more)
            return x

    text = Text(torch.zeros(2, 3, 4), torch.zeros(2, 5))
    for frames, rows in (([wide, whole], [[100, 200, 0, 32, 64, 64], [64, 64, 0, 0, 64, 64]]), (whole, None)):
        tell_unet(cast("UNet", Network()), text, frames)(torch.zeros(2, 4, 8, 8), torch.zeros(2), None, [])
        assert seen["sizes"].tolist() == (rows or [[64, 64, 0, 0, 64, 64]] * 2)
