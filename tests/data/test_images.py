"""Files of every kind become 8-bit RGB, or are named as broken."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from softteacher.data.images import (
    PAD,
    ROTATED,
    BadImage,
    decode,
    inference_size,
    letterbox,
    load_image,
    original_size,
    resize,
)
from softteacher.errors import UserError

inference_size.__test__ = False  # a function of the library that pytest would take for a test

COLOUR = (200, 100, 50)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(mode):
    return Image.new("RGB", (6, 4), COLOUR).convert(mode)


def grey16(low, high, kind=np.uint16):
    return Image.fromarray(np.linspace(low, high, 24).reshape(4, 6).astype(kind))


@pytest.mark.parametrize(
    ("data", "odd", "expected", "tolerance"),
    [
        (encoded(solid("RGB")), [], COLOUR, 0),
        (encoded(solid("RGB"), "JPEG", quality=95), [], COLOUR, 6),
        (encoded(solid("RGB"), "WEBP", lossless=True), [], COLOUR, 0),
        (encoded(solid("CMYK"), "JPEG", quality=95), ["CMYK"], COLOUR, 6),
        (encoded(solid("L")), ["L"], (124, 124, 124), 1),
        (encoded(solid("P")), ["P"], COLOUR, 26),  # a palette of web colours
        (encoded(solid("RGBA")), ["RGBA"], COLOUR, 0),
        (encoded(solid("LA")), ["LA"], (124, 124, 124), 1),
        (encoded(Image.new("1", (6, 4), 1)), ["1"], (255, 255, 255), 0),
        (encoded(Image.new("I;16", (6, 4), 0x8000)), ["I;16"], (127, 127, 127), 1),
        (encoded(Image.new("F", (6, 4), 128 * 257.0), "TIFF"), ["F"], (128, 128, 128), 1),
        (encoded(Image.new("F", (6, 4), np.nan), "TIFF"), ["F"], (0, 0, 0), 0),
        (encoded(solid("YCbCr"), "TIFF"), ["YCbCr"], COLOUR, 3),
    ],
)
def test_every_mode_becomes_rgb(data, odd, expected, tolerance):
    image, found = decode(data, "x")
    assert found == odd
    assert (image.mode, image.size) == ("RGB", (6, 4))
    np.testing.assert_allclose(np.asarray(image, int), np.broadcast_to(expected, (4, 6, 3)), atol=tolerance)


@pytest.mark.parametrize("picture", [grey16(0, 65535), grey16(0, 65535, np.int32), grey16(0, 65535, np.dtype(">u2"))])
def test_16_bit_is_scaled_and_not_cut_off(picture):
    values = np.asarray(decode(encoded(picture, "TIFF"), "x")[0])[..., 0]
    np.testing.assert_allclose(values.ravel(), np.linspace(0, 255, 24), atol=1)


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383])
def test_what_holds_fewer_bits_is_not_darkened(white):
    """A sensor's 10, 12 or 14 bits come in a 16-bit file."""
    values = np.asarray(decode(encoded(grey16(0, white), "TIFF"), "x")[0])[..., 0]
    np.testing.assert_allclose(values.ravel(), np.linspace(0, 255, 24), atol=1)


def test_infinite_pixels_are_black():
    picture = np.full((4, 6), 128, np.float32)
    picture[0, 0] = np.inf
    values = np.asarray(decode(encoded(Image.fromarray(picture), "TIFF"), "x")[0])[..., 0]
    assert values.ravel().tolist() == [0] + [128] * 23


def test_floats_up_to_1_are_shares_of_white():
    values = np.asarray(decode(encoded(grey16(0, 1, np.float32), "TIFF"), "x")[0])[..., 0]
    np.testing.assert_allclose(values.ravel(), np.linspace(0, 255, 24), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    raw = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    image, odd = decode(encoded(Image.fromarray(raw), "PNG", exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(image), raw)
    assert odd == ([ROTATED] if orientation > 1 else [])


def test_broken_exif_is_no_broken_image():
    data = encoded(solid("RGB"), "JPEG", exif=b"Exif\0\0garbage")
    assert decode(data, "x")[0].size == (6, 4)


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def test_no_program_is_started_for_an_image(monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the file's name says."""
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    data = encoded(NOISE, "EPS")
    with pytest.raises(BadImage, match=r"photo\.jpg: no image"):
        decode(data, "photo.jpg")
    assert not started


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"hello", "no image"),
        (b"\xff\xd8\xff", "no image|broken"),
        (png(100_000, 100_000), "100000 x 100000 pixels is absurdly large"),
        (png(2**31 - 1, 2**31 - 1), "absurdly large|broken"),
        (png(64, 64), "broken image"),
        *((encoded(NOISE, kind)[:1500], "broken image") for kind in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP")),
    ],
)
def test_broken(data, message):
    with pytest.raises(BadImage, match=message) as e:
        decode(data, "folder/x.png")
    assert str(e.value).startswith("folder/x.png: ")
    assert len(str(e.value).splitlines()) == 1


def photograph(width, height, mode="RGB", **options):
    """A smooth JPEG."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(picture.convert(mode), "JPEG", quality=95, **options)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((640, 480), 60, (80, 60)),
        ((640, 480), 61, (160, 120)),
        ((480, 640), 240, (240, 320)),
        ((640, 480), 241, (640, 480)),
        ((644, 480), 60, (161, 120)),  # 8 does not divide it
        ((641, 480), 60, (641, 480)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_smaller(size, short_side, expected, mode):
    data = photograph(*size, mode, progressive=mode == "RGB")
    whole, small = decode(data, "x")[0], decode(data, "x", short_side)[0]
    assert (whole.size, original_size(whole)) == (size, size)
    assert (small.mode, small.size, original_size(small)) == ("RGB", expected, size)
    difference = np.asarray(small, int) - np.asarray(whole.resize(expected, Image.Resampling.BOX), int)
    assert np.abs(difference).max() <= 4


def test_decoding_smaller_hides_no_damage_and_leaves_other_kinds_alone():
    with pytest.raises(BadImage, match="broken image"):
        decode(photograph(640, 480)[:-500], "x", 60)
    assert decode(encoded(NOISE), "x", 8)[0].size == NOISE.size


def test_load_image(tmp_path):
    (tmp_path / "方.png").write_bytes(encoded(solid("L")))
    assert load_image(tmp_path / "方.png").mode == "RGB"
    with pytest.raises(UserError, match="no such file"):
        load_image(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((640, 480), (800, 1333), (1067, 800)),
        ((1000, 300), (800, 1333), (1333, 400)),
        ((480, 640), (240, 9999), (240, 320)),
        ((100, 1), (128, 213), (213, 2)),
        ((100_000, 1), (128, 213), (213, 1)),
        ((1, 1), (64, 64), (64, 64)),
    ],
)
def test_the_size_at_test_time(size, limits, expected):
    assert inference_size(*size, *limits) == expected


@pytest.mark.parametrize(
    ("size", "canvas", "expected"),
    [
        ((200, 100), (64, 128), (128, 64)),
        ((100, 200), (64, 128), (32, 64)),
        ((64, 64), (64, 64), (64, 64)),
        ((300, 1), (32, 64), (64, 1)),
    ],
)
def test_letterbox(size, canvas, expected):
    image = Image.new("RGB", size, COLOUR)
    pixels, scale = letterbox(image, canvas, 64, 128)
    width, height = expected
    assert pixels.shape == (*canvas, 3)
    assert scale == (width / size[0], height / size[1])
    assert (pixels[:height, :width] == COLOUR).all()
    padding = np.ones(canvas, bool)
    padding[:height, :width] = False
    assert (pixels[padding] == PAD).all()


def test_letterbox_without_shrinking_is_the_resizing_of_the_evaluation():
    size = inference_size(*NOISE.size, 48, 96)
    np.testing.assert_array_equal(letterbox(NOISE, (64, 96), 48, 96)[0][:48, :48], np.asarray(resize(NOISE, *size)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_letterbox_of_a_reduced_jpeg_scales_from_the_original(mode, tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(encoded(NOISE.resize((800, 640)).convert(mode), "JPEG"))
    whole, small = load_image(path), load_image(path, 64)
    assert small.size == (100, 80)
    (canvas, scale), (reduced, reduced_scale) = (letterbox(image, (64, 96), 64, 96) for image in (whole, small))
    assert scale == reduced_scale == (80 / 800, 64 / 640)
    assert np.abs(canvas.astype(int) - reduced)[:64, :80].mean() < 6
    np.testing.assert_array_equal(canvas[:, 80:], reduced[:, 80:])
