"""Building, filtering and writing sets of pairs."""

import hashlib
import io
import json
import random
import weakref
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from condit.data.files import hash_file
from condit.data.grouped import GroupedPairs
from condit.data.images import load_image, save_image
from condit.data.pairs import Pair, ShardPairs, check, open_pairs
from condit.pairs.build import Grouping, made, make_rows, of_canvas
from condit.pairs.filters import FilterRules, Filters, Hashes, PairEncoder, perceptual_hash
from condit.pairs.sets import SetForm, files_of, write_set
from condit.training.paired import open_folder

SIZE = 16


def noise(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Three subjects in two styles, two images of each prompt, as `condit data draw` writes them."""
    folder, lines = tmp_path_factory.mktemp("drawn"), []
    for n in range(12):
        subject, style = f"subject {n // 4}", f"style {n // 2 % 2}"
        save_image(noise(n), folder / f"images/{n}.png")
        groups = {"style_group": f"{subject}, {style}", "content_group": subject}
        row = {"file_name": f"images/{n}.png", "text": f"{subject}, {style}", **groups, "style": style, "seed": n}
        lines.append(json.dumps({**row, "subject": subject}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def raise_error(place: str, text: str) -> None:
    raise AssertionError(f"{place}: {text}")


def built(source: Path, out: Path, kind: str, form: SetForm | None = None, conditions=(), across=False) -> dict:
    how = Grouping(across=across)
    rows = partial(make_rows, kind, source, conditions, how)
    return write_set(source, out, rows, {"kind": kind}, form or SetForm())


def number(image) -> int:
    """The seed of a `noise` image."""
    pixels = load_image(image).tobytes()
    return next(n for n in range(12) if noise(n).tobytes() == pixels)


@pytest.mark.parametrize("across", [False, True])
def test_pairs_of_groups_share_a_style_or_a_subject(drawn, across):
    rows = [pair for _, pair in make_rows("groups", drawn, (), Grouping(across=across), raise_error)]
    styles = 0
    for pair in rows:
        n = number(pair.image)
        for content in pair.references.get("content", ()):
            other = number(content)
            assert other // 4 == n // 4 and other // 2 != n // 2
        for style in pair.references.get("style", ()):
            other = number(style)
            styles += 1
            assert other // 2 % 2 == n // 2 % 2 and other != n
            assert (other // 4 != n // 4) is across
    assert len(rows) == 12 and styles == (8 if across else 12)  # the first subject has no other one before it


def test_halves_of_a_canvas_are_each_others_subject():
    left, right = noise(1), noise(2)
    canvas = Image.new("RGB", (2 * SIZE, SIZE))
    canvas.paste(left, (0, 0))
    canvas.paste(right, (SIZE, 0))
    wide = Pair(canvas, "whole", {}, columns={"subject": "a mug", "style": "on a desk | in the snow"})
    errors: list[str] = []
    rows = [("row 1", wide), ("row 2", Pair(left, "", {}))]
    (place, one), (_, other) = made(rows, of_canvas, lambda place, text: errors.append(f"{place}: {text}"))
    assert place == "row 1/0"
    assert (one.text, other.text) == ("a mug, on a desk", "a mug, in the snow")
    assert [number(x) for x in (one.image, one.one("subject"), other.image, other.one("subject"))] == [1, 2, 2, 1]
    assert errors == ["row 2: expected two pictures side by side; found 16 x 16 pixels"]


def test_any_folder_of_pictures_becomes_pairs_with_captions_and_conditions(tmp_path):
    source = tmp_path / "pictures"
    icon = Image.new("RGBA", (SIZE, SIZE))
    icon.paste((255, 0, 0, 255), (4, 4, 12, 12))
    save_image(icon, source / "b/icon.png", recipe={"prompt": "a red square"})
    save_image(noise(1), source / "a.png")
    (source / "a.txt").write_text("noise")
    (source / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="has no rows: expected pictures"):
        built(source / "none", tmp_path / "none", "pictures")
    card = built(source, tmp_path / "out", "pictures", conditions=("edges", "gray", "mask"))
    assert (card["rows"], card["errors"]) == (2, 1)
    assert json.loads((tmp_path / "out" / "errors.jsonl").read_text())["row"] == "c.png"
    pairs = open_pairs(tmp_path / "out")
    assert [pairs[i].text for i in range(2)] == ["noise", "a red square"]
    mask = np.asarray(load_image(pairs[1].one("mask")))[:, :, 0] > 127
    assert mask[4:12, 4:12].all() and mask.sum() == 64
    assert set(pairs[1].references) == {"edges", "gray", "mask"}


def test_tars_and_folder_hold_the_same_rows_and_equal_runs_equal_bytes(drawn, tmp_path):
    forms = {"a": SetForm(shard_rows=5), "b": SetForm(shard_rows=5), "c": SetForm("folder", licence="CC0-1.0")}
    cards = {name: built(drawn, tmp_path / name, "groups", form) for name, form in forms.items()}
    tars = [f"{n:06d}.tar" for n in range(3)]
    assert [shard["name"] for shard in cards["a"]["shards"]] == tars
    assert all((tmp_path / "a" / t).read_bytes() == (tmp_path / "b" / t).read_bytes() for t in tars)
    assert all(shard["sha256"].startswith(hash_file(tmp_path / "a" / shard["name"])) for shard in cards["a"]["shards"])
    one, other = open_pairs(tmp_path / "a"), open_pairs(tmp_path / "c")
    assert isinstance(one, ShardPairs) and len(one) == len(other) == 12
    for i in (11, 0, 5):
        assert one[i].text == other[i].text and one[i].columns.items() <= other[i].columns.items()
        assert [load_image(one[i].one(r)).tobytes() for r in ("style", "content")] == [
            load_image(other[i].one(r)).tobytes() for r in ("style", "content")
        ]
    assert cards["c"]["licences"] == {"CC0-1.0": 12} and cards["a"]["seeds"] == (0, 11)
    assert check(tmp_path / "a").problems == check(tmp_path / "c").problems == ()
    target, reference = GroupedPairs(one).draw(random.Random(0), "content")
    assert number(target.image) // 4 == number(reference) // 4
    batches = [one.batch(random.Random(seed), 4, 11) for seed in range(60)]
    assert {i // 5 for batch in batches for i in batch} == {0, 1, 2} and {i for b in batches for i in b} == set(
        range(11)
    )
    assert all(len({i // 5 for i in batch}) == 1 for batch in batches)
    source = open_folder(one, (16, 16), 16)
    source.check(["content", "style"])
    assert source.batch(random.Random(0), "content", 3).images.shape == (3, 3, 16, 16)


def test_a_card_that_does_not_fit_its_tars_raises(drawn, tmp_path):
    built(drawn, tmp_path / "set", "groups", SetForm(shard_rows=5))
    (tmp_path / "set" / "000001.tar").write_bytes((tmp_path / "set" / "000002.tar").read_bytes())
    pairs = open_pairs(tmp_path / "set")
    assert pairs[0].text
    with pytest.raises(ValueError, match="000001.tar has 2 rows; .*card.json says 5"):
        pairs[7]
    (tmp_path / "set" / "card.json").write_text('{"shards": 3}')
    with pytest.raises(ValueError, match="card.json is damaged"):
        open_pairs(tmp_path / "set")


def test_an_interrupted_set_is_made_again_and_another_one_is_refused(drawn, tmp_path, monkeypatch):
    whole = built(drawn, tmp_path / "whole", "groups", SetForm(shard_rows=5))
    calls = []

    def stop(pair):
        calls.append(pair)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return files_of(pair)

    monkeypatch.setattr("condit.pairs.sets.files_of", stop)
    with pytest.raises(KeyboardInterrupt):
        built(drawn, tmp_path / "cut", "groups", SetForm(shard_rows=5))
    assert not (tmp_path / "cut" / "card.json").exists()
    assert built(drawn, tmp_path / "cut", "groups", SetForm(shard_rows=5)) == whole
    assert not list((tmp_path / "cut").glob(".*.tmp"))
    with pytest.raises(ValueError, match="holds other files"):
        built(drawn, tmp_path / "cut", "groups", SetForm(shard_rows=6))


# Filters


def mean_colours(images) -> torch.Tensor:
    return torch.stack([torch.tensor(np.asarray(x, dtype=np.float32).mean((0, 1)) - 128) for x in images])


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ENCODER = PairEncoder(
    "colours", mean_colours, lambda words: torch.tensor([COLOURS[w] for w in words], dtype=torch.float32) - 128
)


def pair_of(text: str, colour: str, reference: str | None = None, size=(64, 64)) -> Pair:
    pixels = np.asarray(noise(hash_of(text, colour, size), size)) // 8
    image = Image.fromarray((pixels + np.array(COLOURS[colour]) * 7 // 8).astype(np.uint8))
    references = {"subject": (png(Image.new("RGB", (8, 8), COLOURS[reference])),)} if reference else {}
    return Pair(png(image), text, references)


def hash_of(*values: object) -> int:
    return int(hashlib.sha256(str(values).encode()).hexdigest()[:8], 16)


def test_each_filter_rejects_what_it_names_and_counts_it():
    rows = [
        ("small", pair_of("red", "red", size=(64, 32))),
        ("long", pair_of("red", "red", size=(512, 64))),
        ("broken", Pair(b"no image", "red", {})),
        ("good", pair_of("red", "red", "red")),
        ("again", pair_of("red", "red", "red")),
        ("text", pair_of("green", "red", "red")),
        ("reference", pair_of("blue", "blue", "green")),
        ("broken reference", Pair(pair_of("green", "green").image, "green", {"subject": (b"none",)})),
    ]
    errors: list[str] = []
    filters = Filters(FilterRules(text=(0.5, 1.1), agree={"subject": (0.5, 1.1)}), ENCODER, batch=2)
    kept = list(filters(rows, lambda place, text: errors.append(place)))
    ((_, only),) = kept
    assert only.text == "red" and cast(float, only.columns["subject_agreement"]) > 0.9
    assert errors == ["broken", "broken reference"] and filters.read == 8
    shares = {name: (tally.rows, tally.rows - tally.rejected) for name, tally in filters.tallies.items()}
    assert shares == {"size": (7, 5), "duplicate": (5, 4), "text": (4, 3), "subject": (2, 1)}
    assert filters.tallies["subject"].sheet("x").width > 0
    assert cast(dict, filters.tallies["text"].card()["quantiles"])["0.01"] < 0.5


def test_a_copy_of_the_target_is_above_the_span_and_references_are_chosen_one_by_one():
    images = [png(Image.new("RGB", (8, 8), colour)) for colour in ((255, 0, 0), (255, 160, 40), (0, 255, 0))]
    pair = Pair(png(Image.new("RGB", (64, 64), (255, 0, 0))), "red", {"subject": tuple(images)})
    rules = FilterRules(distance=None, agree={"subject": (0.5, 0.99)})
    ((_, kept),) = Filters(rules, ENCODER)([("row", pair)], raise_error)
    assert kept.references["subject"] == (images[1],)


def test_limits_are_checked_before_an_image_is_decoded(monkeypatch):
    bomb = png(Image.new("1", (9000, 8000)))
    monkeypatch.setattr("condit.pairs.filters.load_image", lambda source: pytest.fail("decoded"))
    errors: list[str] = []
    rows = [("bomb", Pair(bomb, "red", {}))]
    assert list(Filters(FilterRules(), ENCODER)(rows, lambda _, text: errors.append(text))) == []
    assert errors == ["9000 x 8000 pixels; the limit is 64 million"]


def test_a_perceptual_hash_survives_scaling_and_compression_and_differs_between_images():
    for seed in range(8):
        image = noise(seed, (64, 64)).resize((128, 128), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.resize((80, 80)).save(buffer, "JPEG", quality=70)
        code = perceptual_hash(image)
        assert (code ^ perceptual_hash(load_image(buffer.getvalue()))).bit_count() <= 3
        assert (code ^ perceptual_hash(noise(seed + 100, (64, 64)))).bit_count() > 10


def test_hashes_are_found_at_the_distance_in_any_bits_and_no_further():
    rng, distance = random.Random(0), 3
    hashes = Hashes(distance)
    codes = [rng.getrandbits(64) for _ in range(200)]
    assert all(hashes.add(code) for code in codes)
    for code in codes:
        flips = sum(1 << bit for bit in rng.sample(range(64), rng.randint(0, distance)))
        assert not hashes.add(code ^ flips)
        assert hashes.add(code ^ sum(1 << bit for bit in rng.sample(range(64), distance + 1)))


def test_no_more_than_a_batch_of_rows_is_held():
    alive: weakref.WeakSet = weakref.WeakSet()

    class Row(Pair):
        __hash__ = object.__hash__

    def rows():
        for n in range(40):
            pair = Row(png(noise(n, (64, 64))), "red", {})
            alive.add(pair)
            yield f"{n}", pair

    most = 0
    for _ in Filters(FilterRules(distance=None), ENCODER, batch=4)(rows(), raise_error):
        most = max(most, len(alive))
    assert most <= 2 * 4
