"""Weak and strong views of an image, each with the 3x3 matrix that maps original to view pixels (paper, Table 8).

Pixel coordinates are continuous: the left edge of the image is x = 0, the right edge x = width. Ranges are those of the
authors' code; a shear goes by the tangent of its angle, in x and y at once (theirs by the hyperbolic tangent, one after
the other).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from softteacher.config import DataSettings
from softteacher.data.images import PAD, inference_size, original_size, resize

Rng = np.random.Generator


@dataclass
class View:
    """One augmented image.

    Attributes:
        image: RGB.
        matrix: [3, 3] float64, original -> view, on column vectors (x, y, 1).
    """

    image: Image.Image
    matrix: np.ndarray


def largest_short_side(settings: DataSettings) -> int:
    """The short side of the largest view, in pixels: an image needs no more of them."""
    return round(settings.short_side * settings.scale_jitter[1])


def labeled_view(image: Image.Image, rng: Rng, settings: DataSettings) -> View:
    """Resize, flip and one colour operation: what labelled images go through."""
    view = weak_view(image, rng, settings)
    return View(color(view.image, rng), view.matrix) if settings.labeled_color else view


def weak_view(image: Image.Image, rng: Rng, settings: DataSettings) -> View:
    """Resize and flip: what the teacher sees."""
    low, high = (round(settings.short_side * share) for share in settings.scale_jitter)
    short = int(rng.integers(low, high + 1))
    original = original_size(image)
    width, height = inference_size(*original, short, max(short, settings.max_long_side))
    matrix = np.diag([width / original[0], height / original[1], 1.0])
    image = resize(image, width, height)
    if rng.random() < settings.horizontal_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1.0]]) @ matrix
    return View(image, matrix)


def strong_view(image: Image.Image, rng: Rng, settings: DataSettings) -> View:
    """Resize, flip, one colour and one geometry operation in random order, erased patches: what the student sees."""
    view = weak_view(image, rng, settings)
    geometry_first = rng.random() < 0.5
    for step in ("geometry", "color") if geometry_first else ("color", "geometry"):
        if step == "color" and settings.strong_color:
            view = View(color(view.image, rng), view.matrix)
        if step == "geometry" and settings.strong_geometry:
            view = warp(view, geometry_matrix(view.image.size, rng, settings))
    return View(erase(view.image, rng), view.matrix) if settings.strong_erase else view


def color(image: Image.Image, rng: Rng) -> Image.Image:
    """One of the nine colour operations, at a random magnitude."""
    factor = rng.uniform(0.28, 1.72)
    operations = (
        lambda: image,
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: ImageOps.solarize(image, int(rng.integers(25, 231))),
        lambda: ImageEnhance.Color(image).enhance(factor),
        lambda: ImageEnhance.Contrast(image).enhance(factor),
        lambda: ImageEnhance.Brightness(image).enhance(factor),
        lambda: ImageEnhance.Sharpness(image).enhance(factor),
        lambda: ImageOps.posterize(image, int(rng.integers(1, 5))),
    )
    return operations[rng.integers(len(operations))]()


def geometry_matrix(size: tuple[int, int], rng: Rng, settings: DataSettings) -> np.ndarray:
    """The matrix of one of the four geometry operations, about the image centre; translations by whole pixels.

    Args:
        size: (width, height) in pixels.
        rng: draws the operation and its magnitude.
        settings: largest rotation and translation.
    """
    width, height = size
    matrix = np.eye(3)
    angle = math.radians(rng.uniform(-settings.max_rotation, settings.max_rotation))
    match rng.integers(4):
        case 0:
            matrix[0, 2] = round(rng.uniform(-settings.max_translation, settings.max_translation) * width)
        case 1:
            matrix[1, 2] = round(rng.uniform(-settings.max_translation, settings.max_translation) * height)
        case 2:
            cos, sin = math.cos(angle), math.sin(angle)
            matrix[:2, :2] = [[cos, -sin], [sin, cos]]
        case 3:
            matrix[0, 1] = math.tan(angle)
            matrix[1, 0] = math.tan(math.radians(rng.uniform(-settings.max_rotation, settings.max_rotation)))
    centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    return centre @ matrix @ np.linalg.inv(centre)


def warp(view: View, matrix: np.ndarray) -> View:
    """Apply an affine matrix (view -> new view) to a view; what comes from outside is grey."""
    shift = matrix[:2, 2].round().astype(int)
    if np.allclose(matrix[:2], np.c_[np.eye(2), shift], rtol=0, atol=1e-9):  # whole pixels: many times faster
        image = Image.new("RGB", view.image.size, PAD)
        image.paste(view.image, tuple(shift.tolist()))
    else:
        coefficients = np.linalg.inv(matrix)[:2].ravel().tolist()
        image = view.image.transform(
            view.image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=PAD
        )
    return View(image, matrix @ view.matrix)


def erase(image: Image.Image, rng: Rng) -> Image.Image:
    """Fill one to five patches, each of one share (up to 20 %) of both sides, with grey."""
    image = image.copy()
    for _ in range(rng.integers(1, 6)):
        share = rng.uniform(0, 0.2)
        width, height = (round(share * side) for side in image.size)
        x, y = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        image.paste(PAD, (int(x), int(y), int(x) + width, int(y) + height))
    return image


def project_boxes(boxes: torch.Tensor, matrix: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
    """Boxes in another view: the four corners projected, their minimum and maximum.

    Args:
        boxes: [N, 4] xyxy pixels.
        matrix: [3, 3] from the boxes' view to the other.
        size: (height, width) of the other view before padding, to clip to; none: not clipped.

    Returns:
        [N, 4] xyxy pixels of the other view, float32.
    """
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    corners = torch.stack(
        [torch.stack([x1, x2, x2, x1]), torch.stack([y1, y1, y2, y2]), torch.ones_like(x1).expand(4, -1)]
    )
    x, y, w = torch.einsum("ij,jkn->ikn", matrix.double(), corners)
    x, y = x / w, y / w
    if size is not None:
        height, width = size.tolist()
        x, y = x.clamp(0, width), y.clamp(0, height)
    return torch.stack([x.amin(0), y.amin(0), x.amax(0), y.amax(0)], -1).float()
