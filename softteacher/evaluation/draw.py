"""Pictures of detections."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from softteacher.detections import Detections, paste_masks

TILE = 480  # pixels, the long side of a picture on a contact sheet
COLUMNS = 4


def draw(
    image: Image.Image,
    detections: Detections,
    classes: Sequence[str],
    truth: Detections | None = None,
    masks: Iterable[np.ndarray] = (),
) -> Image.Image:
    """A copy of an image with boxes, class names and scores, masks half-transparent; ground truth is dashed in white.

    Args:
        image: RGB.
        detections: boxes in its pixels (numpy).
        classes: names in label order.
        truth: ground truth, if known.
        masks: [H, W] bool of each detection, if the detector has masks.
    """
    zoom = max(1, round(480 / max(image.size)))  # small images are blown up, or no name could be read
    picture = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
    for mask, label in zip(masks, detections.labels.tolist(), strict=False):
        alpha = Image.fromarray(mask.astype(np.uint8) * 128).resize(picture.size, Image.Resampling.NEAREST)
        picture.paste(_colour(label), (0, 0), alpha)
    canvas = ImageDraw.Draw(picture)
    unit = max(picture.size) / 480
    font = ImageFont.load_default(size=round(13 * unit))
    for box in truth.boxes.tolist() if truth else ():
        _dashed(canvas, [v * zoom for v in box], round(max(1, unit)))
    for box, score, label in zip(
        detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
    ):
        red, green, blue = _colour(label)
        x1, y1, x2, y2 = (v * zoom for v in box)
        canvas.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=(red, green, blue), width=round(max(2, 2 * unit)))
        text = f"{classes[label]} {score:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        y = max(0, y1 - (bottom - top) - 4)
        canvas.rectangle((x1, y, x1 + right - left + 6, y + bottom - top + 4), fill=(red, green, blue))
        luminance = 0.3 * red + 0.59 * green + 0.11 * blue
        canvas.text((x1 + 3 - left, y + 2 - top), text, font=font, fill="black" if luminance > 140 else "white")
    return picture


def tile(image: Image.Image, detections: Detections, classes: Sequence[str], caption: str) -> Image.Image:
    """A small picture of an image with its boxes, masks and up to three lines of text, for `contact_sheet`."""
    small = image.copy()
    small.thumbnail((TILE, TILE))
    scale = np.array([small.width / image.width, small.height / image.height] * 2)
    scaled = replace(detections, boxes=detections.boxes * scale)
    masks = () if scaled.masks is None else paste_masks(scaled, small.height, small.width)
    picture = draw(small, scaled, classes, masks=list(masks))
    picture.thumbnail((TILE, TILE))
    lines = textwrap.wrap(caption, 54, max_lines=3, placeholder=" ...")
    out = Image.new("RGB", (TILE, picture.height + 22 * len(lines) + 10), "white")
    out.paste(picture, ((TILE - picture.width) // 2, 0))
    font = ImageFont.load_default(size=17)
    for n, line in enumerate(lines):
        ImageDraw.Draw(out).text((4, picture.height + 4 + 22 * n), line, font=font, fill="black")
    return out


def contact_sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """Pictures of width `TILE` on one sheet, row by row, at least one."""
    gap, columns = 12, min(COLUMNS, len(tiles))
    rows = [tiles[n : n + columns] for n in range(0, len(tiles), columns)]
    heights = [max(t.height for t in row) for row in rows]
    size = (columns * (TILE + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    sheet, y = Image.new("RGB", size, "white"), gap
    for row, height in zip(rows, heights, strict=True):
        for n, picture in enumerate(row):
            sheet.paste(picture, (gap + n * (TILE + gap), y))
        y += height + gap
    return sheet


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _dashed(canvas: ImageDraw.ImageDraw, box: Sequence[float], width: int) -> None:
    x1, y1, x2, y2 = box
    for ax, ay, bx, by in ((x1, y1, x2, y1), (x2, y1, x2, y2), (x2, y2, x1, y2), (x1, y2, x1, y1)):
        length = max(abs(bx - ax), abs(by - ay), 1.0)
        for start in range(0, int(length), 10 * width):
            stop = min(start + 5 * width, length)
            line = [ax + (bx - ax) * start / length, ay + (by - ay) * start / length]
            line += [ax + (bx - ax) * stop / length, ay + (by - ay) * stop / length]
            canvas.line(line, fill="white", width=width)
