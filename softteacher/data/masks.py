"""COCO segmentations (polygons, run lengths) and the masks that they are in a view."""

from __future__ import annotations

from reprlib import repr as show
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from softteacher.data.coco import CocoDataset
from softteacher.errors import UserError

MAX_COORDINATE = 1e5  # pixels; the rasteriser walks along every edge


def require_masks(dataset: CocoDataset) -> None:
    """Every annotation, crowd regions too, must have a segmentation that can be drawn.

    Raises:
        UserError: names the file and the first annotation without.
    """
    a = dataset.annotations
    segmentations = a.segmentations or [[]] * len(a)
    for n, (segmentation, index) in enumerate(zip(segmentations, a.image_index.tolist(), strict=True)):
        image = dataset.images[index]
        if complaint := _complaint(segmentation, image.height, image.width):
            raise UserError(
                f"{dataset.source}: annotation {a.ids[n]}: {complaint}; mend it, or use a fasterrcnn detector, "
                "which needs boxes only"
            )


def draw_masks(
    segmentations: list[Any], original: tuple[int, int], matrix: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The masks of objects in a view, by COCO's own rasteriser.

    Args:
        segmentations: n COCO segmentations that `require_masks` has passed.
        original: (height, width) of the original image.
        matrix: [3, 3] affine, original -> view, on column vectors (x, y, 1).
        size: (height, width) of the view.

    Returns:
        [n, height, width] bool.
    """
    masks = np.zeros((len(segmentations), *size), bool)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, list):
            corners = [np.reshape(p, (-1, 2)) @ matrix[:2, :2].T + matrix[:2, 2] for p in segmentation]
            parts = coco_mask.frPyObjects([c.ravel().tolist() for c in corners], *size)
            mask[:] = coco_mask.decode(coco_mask.merge(parts))
        else:
            image = Image.fromarray(coco_mask.decode(_run_lengths(segmentation, *original)) * np.uint8(255))
            back = np.linalg.inv(matrix)[:2].ravel().tolist()
            warped = image.transform(size[::-1], Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
            mask[:] = np.asarray(warped) > 127
    return masks


def _run_lengths(segmentation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of those that a json has, compressed or not."""
    if isinstance(segmentation["counts"], str):
        return segmentation
    return coco_mask.frPyObjects(segmentation, height, width)


def _complaint(segmentation: Any, height: int, width: int) -> str | None:
    if not segmentation:
        return "has no 'segmentation'"
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            return f"segmentation is {show(segmentation)}; a polygon is a list x1, y1, x2, y2, ... of 3 corners or more"
        if not all({int, float}.issuperset(map(type, p)) and _near(p) for p in segmentation):
            return f"segmentation is {show(segmentation)}; the corners must be pixels"
        return None
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return (
            f"segmentation is {show(segmentation)}; it must be a list of polygons, or an object with 'counts' and the "
            f"'size' of its image, [{height}, {width}]"
        )
    try:
        coco_mask.decode(_run_lengths(segmentation, height, width))
    except (ValueError, RuntimeError, TypeError, KeyError, OverflowError) as e:
        return f"the run lengths of its segmentation are broken ({(str(e) or type(e).__name__).splitlines()[0]})"
    return None


def _near(polygon: list[float]) -> bool:
    # of a list with nan minimum and maximum depend on the order, the sum is always nan
    return min(polygon) > -MAX_COORDINATE and max(polygon) < MAX_COORDINATE and sum(polygon) == sum(polygon)
