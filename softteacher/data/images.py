"""Images in: a user's file becomes 8-bit RGB, or is named as broken. And the resizing that tests and serving share."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from softteacher import storage
from softteacher.errors import UserError

ROTATED = "EXIF rotation"
MAX_PIXELS = 100_000_000
PAD = (124, 116, 104)  # the ImageNet mean colour: about zero after normalisation
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow hands others to programs: PostScript is executed
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

# we refuse by our own limit; Pillow would only warn
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = None


class BadImage(UserError):
    """A file that is no whole image: truncated, empty, something else, or absurdly large."""


def decode(data: bytes, name: str, short_side: int | None = None) -> tuple[Image.Image, list[str]]:
    """Decode an image file.

    EXIF rotation is ignored, as COCO tools do: boxes belong to the raw pixels.

    Args:
        data: the file's bytes.
        name: what the error calls it.
        short_side: a JPEG may be decoded to 1/2, 1/4 or 1/8 of its size as long as its short side keeps so many pixels
            (several times faster for photographs of many megapixels); `original_size` tells its own size.

    Returns:
        The image as 8-bit RGB, and what was odd about it: the mode that it was stored in (`L`, `CMYK`, `P`, `RGBA`,
        `I;16`, ...), and `ROTATED`.

    Raises:
        BadImage: it can't be decoded whole, or has more than `MAX_PIXELS`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{name}: {image.width} x {image.height} pixels is absurdly large; scale it down")
        size = image.size
        if short_side and (scale := _jpeg_scale(size, short_side)) > 1 and isinstance(image, JpegImageFile):
            image.draft(None, (size[0] // scale, size[1] // scale))
            image.info["original_size"] = size
        image.load()
        odd = [] if image.mode == "RGB" else [image.mode]
        return as_rgb(image), odd + [ROTATED] * _rotated(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{name}: {'empty file' if not data else 'no image'}; replace or remove it") from None
    except Exception as e:  # Pillow's plugins raise nearly anything on garbage
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise BadImage(f"{name}: broken image ({why}); replace or remove it") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    Deep grey keeps the 8 highest bits that its brightest pixel has (a 12-bit sensor's file is a 16-bit one), where
    Pillow itself would clip to white; floats up to 1 are shares of white.
    """
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        top = max(values.max(), 0.0)
        white = 1.0 if image.mode == "F" and top <= 1 else 2.0 ** max(8, math.ceil(math.log2(top + 1)))
        image = Image.fromarray((values / white * 256).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def original_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the file of a decoded image, in pixels."""
    return image.info.get("original_size", image.size)


def _jpeg_scale(size: tuple[int, int], short_side: int) -> int:
    # only by what divides both sides: a partial pixel at the edge would shift the boxes
    return next((n for n in (8, 4, 2) if size[0] % n == size[1] % n == 0 and min(size) >= n * short_side), 1)


def _rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # broken EXIF data don't make a broken image
        return False


def load_image(uri: str | Path, short_side: int | None = None) -> Image.Image:
    """An image file, local or `s3://`, as 8-bit RGB; `short_side` as for `decode`.

    Raises:
        BadImage: it is no whole image.
        UserError: it is missing or can't be read.
    """
    return decode(storage.read_bytes(uri), str(uri), short_side)[0]


def inference_size(width: int, height: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height with the ratio kept, the short side at most `short_side` and the long at most `long_side`."""
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bilinear with antialiasing: the one way in which images are resized, in training, test and serving."""
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)


def letterbox(
    image: Image.Image, size: tuple[int, int], short_side: int, long_side: int
) -> tuple[np.ndarray, tuple[float, float]]:
    """Resize as at test time and paste into the top left corner of a canvas.

    Args:
        image: RGB; it may have been decoded at a reduced size.
        size: (height, width) of the canvas; an image that would not fit is made smaller.
        short_side: as in `inference_size`.
        long_side: as in `inference_size`.

    Returns:
        The canvas, uint8 [H, W, 3], and the scale (x, y) from original (see `original_size`) to canvas pixels.
    """
    width, height = inference_size(*image.size, short_side, long_side)
    shrink = min(1.0, size[1] / width, size[0] / height)
    width, height = max(1, min(size[1], round(width * shrink))), max(1, min(size[0], round(height * shrink)))
    canvas = np.full((*size, 3), PAD, np.uint8)
    canvas[:height, :width] = np.asarray(resize(image, width, height))
    original = original_size(image)
    return canvas, (width / original[0], height / original[1])
