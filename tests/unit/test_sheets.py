"""A sheet shows every picture where its row and column say, and its words fit."""

import pytest
from PIL import Image

from condit.data.sheets import HIGHLIGHT, SheetCell, contact_sheet


def colours(sheet: Image.Image) -> set:
    return {colour for _, colour in sheet.getcolors(1 << 20) or []}


def test_every_image_is_on_the_sheet_and_inputs_are_framed():
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    sheet = contact_sheet(
        [[red, None], [None, SheetCell(blue, "reference", is_input=True)]], ["one", "two"], title="A title"
    )
    assert {(255, 0, 0), (0, 0, 255), HIGHLIGHT} <= colours(sheet)
    assert HIGHLIGHT not in colours(contact_sheet([[red, blue]], ["one"]))


def test_the_cell_size_sets_the_sheet_size():
    picture = Image.new("RGB", (32, 16), (255, 0, 0))
    small, large = (contact_sheet([[picture] * 3], ["row"], cell=cell, label_width=100) for cell in (32, 64))
    assert large.width - small.width == 3 * 32
    assert large.height - small.height == 32


def test_long_words_stay_inside_their_column():
    plain = contact_sheet([[Image.new("RGB", (32, 32), "white")]], [""])
    wordy = contact_sheet([[SheetCell(Image.new("RGB", (32, 32), "white"))]], ["word " * 200 + "w" * 300])
    assert wordy.size == plain.size
    column = (160, 0, *plain.size)
    assert wordy.crop(column).tobytes() == plain.crop(column).tobytes()


def test_a_label_is_needed_for_every_row():
    with pytest.raises(ValueError, match="one label a row"):
        contact_sheet([[Image.new("RGB", (4, 4))]], [])
