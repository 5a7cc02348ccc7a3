"""The embedded data set: real handwritten digits in cluttered scenes, made on the spot, the same on every machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from softteacher.console import track
from softteacher.errors import UserError

SIDE = 128
VALIDATION_DIGITS = 500  # writers' digits that only validation images show


def make_digits(folder: str | Path, *, train: int = 600, val: int = 150, seed: int = 0) -> None:
    """Write a COCO data set of digit scenes: `images/` and `annotations/instances_{train,val}.json`.

    scikit-learn's 1,797 scanned digits, scaled, rotated, coloured and pasted with overlap on textured backgrounds among
    distracting strokes. Digits of validation scenes never occur in training scenes.

    Args:
        folder: local folder, made if needed.
        train: number of training images.
        val: number of validation images.
        seed: of everything.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the embedded data set needs scikit-learn: pip install 'softteacher[demo]'") from None
    digits = load_digits()
    glyphs, labels = digits.images / 16.0, digits.target
    order = np.random.default_rng(seed).permutation(len(labels))
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    first = 1
    for part, count, pool in (("train", train, order[VALIDATION_DIGITS:]), ("val", val, order[:VALIDATION_DIGITS])):
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for image_id in track(range(first, first + count), f"make {part}", count):
            scene, boxes = _scene(np.random.default_rng([seed, image_id]), glyphs, labels, pool)
            name = f"{image_id:06d}.jpg"
            scene.save(folder / "images" / name, quality=90)
            images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
            for label, x, y, w, h in boxes:
                row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
                annotations.append({**row, "bbox": [x, y, w, h], "area": w * h})
        categories = [{"id": n + 1, "name": name} for n, name in enumerate(NAMES)]
        tree = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(tree))
        first += count


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _scene(
    rng: np.random.Generator, glyphs: np.ndarray, labels: np.ndarray, pool: np.ndarray
) -> tuple[Image.Image, list[tuple[int, int, int, int, int]]]:
    canvas = _background(rng)
    owner = np.full((SIDE, SIDE), -1)
    placed: list[tuple[int, int, int]] = []  # digit, pixels when pasted, number
    for number in range(rng.integers(2, 5)):
        digit = int(rng.choice(pool))
        mask = _glyph(rng, glyphs[digit], int(rng.integers(28, 58)))
        height, width = mask.shape
        x, y = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        solid = mask > 0.35
        covered = owner[y : y + height, x : x + width][solid]
        if (covered >= 0).mean() > 0.15:  # overlap, but nothing buried
            continue
        patch = canvas[y : y + height, x : x + width]
        colour = rng.uniform(130, 255, 3)
        shade = rng.normal(0, 8, mask.shape)[..., None]
        patch[:] = patch * (1 - mask[..., None]) + (colour + shade) * mask[..., None]
        owner[y : y + height, x : x + width][solid] = number
        placed.append((digit, int(solid.sum()), number))
    boxes = []
    for digit, pixels, number in placed:
        ys, xs = np.nonzero(owner == number)
        if len(ys) > 0.6 * pixels:
            x, y = int(xs.min()), int(ys.min())
            boxes.append((int(labels[digit]), x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1))
    noisy = canvas + rng.normal(0, 6, canvas.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), boxes


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth coloured texture with strokes and blobs that are no digits."""
    coarse = rng.uniform(20, 120, (int(rng.integers(2, 6)), int(rng.integers(2, 6)), 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas = np.asarray(image, np.float64).copy()
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, period = rng.uniform(0, math.pi), rng.uniform(5, 25)
    canvas += rng.uniform(0, 18) * np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)[..., None]
    for _ in range(rng.integers(3, 9)):
        x0, y0, x1, y1 = rng.uniform(0, SIDE, 4)
        length = max(math.hypot(x1 - x0, y1 - y0), 1.0)
        along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length
        across = np.abs((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length
        stroke = (along > 0) & (along < min(length, rng.uniform(8, 40))) & (across < rng.uniform(1, 4))
        canvas[stroke] = rng.uniform(0, 150, 3)
    return canvas


def _glyph(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
    """An 8 x 8 scan as a smooth mask, rotated and stretched, cut to its strokes."""
    image = Image.fromarray((np.pad(glyph, 1) * 255).astype(np.uint8))
    image = image.resize((round(size * rng.uniform(0.8, 1.1)), size), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    image = image.filter(ImageFilter.GaussianBlur(size / 40))
    mask = ((np.asarray(image, np.float64) / 255 - 0.3) / 0.25).clip(0, 1)
    ys, xs = np.nonzero(mask > 0.35)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
