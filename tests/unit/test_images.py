"""Reading is safe, writing is atomic, tensors and pictures turn into each other exactly."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from condit.data.images import load_image, read_recipe, save_image, to_images, to_tensor


def png_bytes(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def noise(height=8, width=12, channels=3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def huge_png(side: int) -> bytes:
    """A valid PNG header of side x side pixels with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG"])
def test_every_allowed_format_is_read_from_path_and_bytes(tmp_path, kind):
    picture = Image.new("RGB", (9, 5), (200, 30, 60))
    path = tmp_path / "no-ending-needed"
    picture.save(path, kind)
    for source in (path, str(path), path.read_bytes()):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (9, 5))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(picture)).max() <= 3  # JPEG is lossy


def test_arrays_tensors_and_images_give_the_same_image():
    pixels = noise()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [
        pixels,
        pixels / 255,
        tensor,
        tensor.float() / 255,
        Image.fromarray(pixels),
        png_bytes(Image.fromarray(pixels)),
    ]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), pixels)


def test_gray_arrays_and_masks_become_three_equal_channels():
    plane = noise()[:, :, 0]
    assert np.array_equal(np.asarray(load_image(plane))[:, :, 2], plane)
    assert np.asarray(load_image(plane > 100)).max() == 255


@pytest.mark.parametrize(
    "array",
    [
        noise() / 127.5 - 1,
        noise().astype(np.int64),
        np.full((4, 4, 3), np.nan),
        noise(channels=2),
        noise()[None],
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["-1..1", "int64", "nan", "two channels", "a batch", "empty"],
)
def test_arrays_of_another_range_type_or_shape_are_refused(array):
    with pytest.raises(ValueError, match="expected"):
        load_image(array)


def test_alpha_is_composited_on_white_or_kept():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert load_image(half, background=(0, 0, 0)).getpixel((0, 0)) == (0, 0, 0)
    assert load_image(half, mode="RGBA").getpixel((0, 0)) == (0, 0, 0, 128)


def test_a_transparent_palette_png_goes_on_white():
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([255, 0, 0])
    assert load_image(png_bytes(picture, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied_once():
    picture = Image.new("RGB", (6, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    once = load_image(out.getvalue())
    assert once.size == (4, 6)
    assert load_image(once).size == (4, 6)


def test_sixteen_bits_are_scaled_not_cut_off():
    plane = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert [pixel[0] for pixel in np.asarray(load_image(png_bytes(Image.fromarray(plane))))[0]] == [0, 128, 255]


def test_only_the_first_frame_of_an_animation_is_read():
    out = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(out, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    assert load_image(out.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_the_given_image_is_not_changed():
    picture = Image.new("RGB", (4, 4), "red")
    load_image(picture).putpixel((0, 0), (0, 0, 0))
    assert picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("side", [30_000, 10_000, 8_001])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(side))
    with pytest.raises(ValueError, match=r"bomb.png .*pixels"):
        load_image(path)


@pytest.mark.parametrize("keep", [0, 20, 60, 200])
def test_a_truncated_image_is_a_clear_error(tmp_path, keep):
    path = tmp_path / "cut.png"
    path.write_bytes(png_bytes(Image.fromarray(noise(64, 64)))[:keep])
    with pytest.raises(ValueError, match=r"cut.png is (broken|empty|not)"):
        load_image(path)


def test_missing_files_folders_text_and_other_formats_are_clear_errors(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.ppm")
    with pytest.raises(FileNotFoundError, match="no image at .*absent.png"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    for name in ("text.png", "image.ppm"):
        with pytest.raises(ValueError, match="supported formats: PNG"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="larger than"):
        load_image(tmp_path / "image.ppm", max_bytes=10)
    with pytest.raises(ValueError, match="found int"):
        load_image(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("url", ["https://example.org/a.png", "file:///etc/passwd", "ftp://example.org/a.png"])
def test_urls_raise_unless_allowed(url):
    with pytest.raises(ValueError, match="is a URL"):
        load_image(url)
    if not url.startswith("https"):
        with pytest.raises(ValueError, match="only http"):
            load_image(url, allow_url=True)


def test_a_png_carries_recipe_and_parameters(tmp_path):
    recipe = {"prompt": "红苹果", "seed": 3, "controls": [{"strength": 0.5}]}
    path = save_image(
        Image.new("RGB", (4, 4)), tmp_path / "new folder" / "a.png", recipe=recipe, parameters="红苹果\nSeed: 3"
    )
    assert read_recipe(path) == recipe
    with Image.open(path) as image:
        assert image.info["parameters"] == "红苹果\nSeed: 3"


def test_an_image_without_a_recipe_raises(tmp_path):
    plain = save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no condit recipe"):
        read_recipe(plain)
    info = PngImagePlugin.PngInfo()
    info.add_text("condit", "[1")
    Image.new("RGB", (4, 4)).save(plain, pnginfo=info)
    with pytest.raises(ValueError, match="broken condit recipe"):
        read_recipe(plain)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="end it in"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.txt")
    assert load_image(save_image(Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")).getpixel((0, 0)) == (255, 255, 255)


def test_a_full_disk_leaves_the_old_image_and_no_temporary_file(tmp_path, monkeypatch):
    path = save_image(Image.new("RGB", (4, 4), "red"), tmp_path / "a.png")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left while writing .*a.png"):
        save_image(Image.new("RGB", (4, 4), "blue"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_saving_onto_a_folder_is_a_clear_error(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")


def test_a_saved_image_has_the_usual_permissions(tmp_path):
    path = save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensor_and_image_turn_into_each_other_exactly():
    pixels = noise()
    tensor = to_tensor(pixels, (8, 12))
    assert (tensor.shape, tensor.dtype) == ((3, 8, 12), torch.float32)
    assert float(tensor.min()) >= -1
    assert float(tensor.max()) <= 1
    assert np.array_equal(np.asarray(to_images(tensor)[0]), pixels)
    assert len(to_images(torch.stack([tensor, tensor]))) == 2


def test_fit_squashes_crops_or_pads():
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("red", (0, 0, 10, 20))
    squashed, cropped, padded = (to_images(to_tensor(wide, 20, fit=fit))[0] for fit in ("squash", "crop", "pad"))
    assert squashed.getpixel((1, 10)) == (255, 0, 0)
    assert cropped.getpixel((1, 10)) == (0, 0, 0)
    assert padded.getpixel((10, 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="squash, crop or pad"):
        to_tensor(wide, 20, fit="stretch")  # pyright: ignore[reportArgumentType]


def test_nan_never_becomes_an_image():
    with pytest.raises(ValueError, match="NaN"):
        to_images(torch.full((1, 3, 4, 4), float("nan")))


def test_a_relative_path_is_returned_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save_image(Image.new("RGB", (4, 4)), "a.png") == Path("a.png")


def test_a_jpeg_with_damaged_exif_is_read_again_and_again():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), "red").save(out, "JPEG", exif=exif)
    for at in range(6, 32):  # the header of the EXIF data and its only tag
        data = bytearray(out.getvalue())
        data[data.index(b"Exif") + at] ^= 255
        once = load_image(bytes(data))
        assert load_image(once).size == once.size


def test_open_files_are_read_from_their_start_as_often_as_needed(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")  # and stands at its end
    for _ in range(2):
        assert load_image(buffer).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with open(tmp_path / "a.png", "rb") as file:
        assert load_image(file).size == (4, 4)
    with pytest.raises(ValueError, match="larger than"):
        load_image(buffer, max_bytes=10)
    with open(tmp_path / "a.png", encoding="latin-1") as file, pytest.raises(ValueError, match="mode 'rb'"):
        load_image(file)  # pyright: ignore[reportArgumentType]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: it is a pipe or a device"):
        load_image(tmp_path / "a.png")
