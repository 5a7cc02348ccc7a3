"""The rows of a COCO json: images, categories and boxes, validated; the first wrong row is named."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PureWindowsPath
from reprlib import repr as show
from typing import Any, TypeGuard

import numpy as np

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError

CLIP_TOLERANCE = 1.0  # pixels; labelling tools round, and a box that is hardly outside must score as it is written
ROOT_RULE = "its 'root' must be an absolute path or an s3:// URI; run `softteacher split` again"
_MAX_INT, _MAX_NUMBER = 2**53, 1e12


@dataclass(slots=True)
class ImageRecord:
    """One image.

    Attributes:
        id: unique in its data set.
        file_name: relative to the root.
        width: in pixels; 0 where no json told it.
        height: likewise.
        root: where it isn't the data set's own.
        new: it came with the last round of collecting (see `training.new_share`).
    """

    id: int
    file_name: str
    width: int = 0
    height: int = 0
    root: str | None = None
    new: bool = False


@dataclass(slots=True)
class Annotations:
    """The boxes of all images, sorted by image.

    Attributes:
        image_index: [N] int64, index into the images.
        bbox: [N, 4] float64, xywh in pixels as the json has them (so that scores equal pycocotools').
        labels: [N] int64, index into the categories.
        area: [N] float64.
        crowd: [N] bool.
        ids: [N] int64.
        segmentations: N COCO segmentations, or none at all.
    """

    image_index: np.ndarray
    bbox: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    ids: np.ndarray
    segmentations: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, keep: np.ndarray) -> Annotations:
        """The annotations at the given positions."""
        return Annotations(
            self.image_index[keep],
            self.bbox[keep],
            self.labels[keep],
            self.area[keep],
            self.crowd[keep],
            self.ids[keep],
            self.segmentations and [self.segmentations[i] for i in keep.tolist()],
        )


def parse_categories(
    source: str, rows: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> list[tuple[int, str]]:
    """(id, name) of the categories, sorted by id.

    Roboflow lists the project itself as their supercategory; it has no annotations and is no class.

    Raises:
        UserError: a row is wrong.
    """
    for n, row in enumerate(rows):
        if not _is_int(row.get("id")) or not _is_text(row.get("name")):
            raise UserError(f"{source}: {_named('category', n, row)}: needs an integer 'id' and a string 'name'")
    parents = [row.get("supercategory") for row in rows]
    roots = [row for row in rows if row.get("supercategory") == "none" and row["name"] in parents]
    project = [row for row in roots if not any(a.get("category_id") == row["id"] for a in annotations)]
    found = sorted((row["id"], row["name"]) for row in rows if row not in project)
    for what, values in (("id", [i for i, _ in found]), ("name", [n for _, n in found])):
        if twice := _duplicate(values):
            raise UserError(f"{source}: category {what} {twice[0]!r} occurs twice; make it unique")
    return found


def parse_images(source: str, rows: list[dict[str, Any]], labeled: set[int]) -> list[ImageRecord]:
    """The images, sorted by id; `labeled`: ids of those whose sizes must be known.

    Raises:
        UserError: a row is wrong.
    """
    images = []
    for n, given in enumerate(rows):
        row = {key: value for key, value in given.items() if value is not None}
        if isinstance(name := row.get("file_name"), str) and "\\" in name and not PureWindowsPath(name).drive:
            row["file_name"] = name.replace("\\", "/")  # a labelling tool on Windows
        if complaint := _image_complaint(row, _is_int(row.get("id")) and row["id"] in labeled):
            raise UserError(f"{source}: {_named('image', n, row)}: {complaint}")
        width, height = row.get("width", 0), row.get("height", 0)
        images.append(ImageRecord(row["id"], row["file_name"], width, height, row.get("root"), row.get("new", False)))
    images.sort(key=lambda i: i.id)
    if twice := _duplicate([i.id for i in images]):
        raise UserError(f"{source}: image id {twice[0]} occurs twice; make the ids unique")
    return images


def parse_annotations(
    source: str, rows: list[dict[str, Any]], images: list[ImageRecord], categories: list[tuple[int, str]]
) -> Annotations:
    """The boxes; degenerate ones are dropped and those that reach out of their image clipped, with a line each.

    Raises:
        UserError: a row is wrong.
    """
    image_ids, category_ids = [i.id for i in images], [i for i, _ in categories]
    annotations = _columns(rows, image_ids, category_ids)
    if annotations is None:
        known = set(image_ids), set(category_ids)
        n, complaint = next((n, c) for n, row in enumerate(rows) if (c := _annotation_complaint(row, *known)))
        raise UserError(f"{source}: {_named('annotation', n, rows[n])}: {complaint}")
    if twice := _duplicate(annotations.ids.tolist()):
        raise UserError(f"{source}: annotation id {twice[0]} occurs twice; make the ids unique")
    if 0 in annotations.ids:
        say(f"{source}: annotation id 0: COCO evaluation counts its box as never found; let the ids start at 1")
    return _repaired(source, annotations.select(np.argsort(annotations.image_index, kind="stable")), images)


@contextmanager
def without_gc() -> Iterator[None]:
    """No search for reference cycles: among millions of new small objects it takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_root(value: Any) -> TypeGuard[str]:
    """Whether a value may be the image root of a manifest."""
    return isinstance(value, str) and value.startswith(("/", "s3://")) and "\0" not in value


def file_name_complaint(name: Any) -> str | None:
    """What is wrong with a `file_name`; none if nothing is."""
    if not _is_text(name, "surrogateescape"):
        return f"file_name is {show(name)}; it must be the path of a file in the image folder"
    if storage.leads_out(name) or "\\" in name or "\0" in name:
        return f"file_name {name!r} leaves the image folder; write it relative to that folder"
    return None


def _image_complaint(row: dict[str, Any], labeled: bool) -> str | None:
    if not _is_int(row.get("id")):
        return f"'id' is {show(row.get('id'))}; it must be an integer"
    if complaint := file_name_complaint(row.get("file_name")):
        return complaint
    if labeled or "width" in row or "height" in row:
        for key in ("width", "height"):
            if not _is_int(row.get(key)) or row[key] <= 0:
                return f"{key!r} is {show(row.get(key))}; it must be a positive integer"
    if row.get("root") is not None and not is_root(row["root"]):
        return f"'root' is {show(row['root'])}; {ROOT_RULE}"
    if not isinstance(row.get("new", False), bool):
        return f"'new' is {show(row['new'])}; it must be true or false"
    return None


def _columns(rows: list[dict[str, Any]], image_ids: list[int], category_ids: list[int]) -> Annotations | None:
    """All rows at once, in the order of the file, since one by one takes far longer; none if any is wrong."""
    ids = _integers([r.get("id") for r in rows])
    image_index = _positions([r.get("image_id") for r in rows], image_ids)
    labels = _positions([r.get("category_id") for r in rows], category_ids)
    boxes: list[Any] = [r.get("bbox") for r in rows]
    if not all(type(b) is list and len(b) == 4 for b in boxes):
        return None
    bbox = _numbers(list(itertools.chain.from_iterable(boxes)))
    area, crowd = ([0 if (v := r.get(key)) is None else v for r in rows] for key in ("area", "iscrowd"))
    areas = _numbers(area)
    try:
        odd = not set(crowd) <= {0, 1}
    except TypeError:
        return None
    if ids is None or image_index is None or labels is None or bbox is None or areas is None or odd:
        return None
    bbox = bbox.reshape(-1, 4)
    # COCO's evaluation would count no box of a negative area, which some tools write where they don't know it
    absent = np.fromiter((r.get("area") is None for r in rows), bool, len(rows)) | (areas < 0)
    areas[absent] = bbox[absent, 2] * bbox[absent, 3]
    segmentations = [r.get("segmentation", []) for r in rows] if any(r.get("segmentation") for r in rows) else None
    return Annotations(image_index, bbox, labels, areas, np.array(crowd, bool), ids, segmentations)


def _integers(values: list[Any]) -> np.ndarray | None:
    try:
        array = np.array(values, np.int64) if set(map(type, values)) <= {int} else None
    except OverflowError:
        return None
    return array if array is not None and ((array < _MAX_INT) & (array > -_MAX_INT)).all() else None


def _positions(values: list[Any], known: list[int]) -> np.ndarray | None:
    """Index of each value in the sorted list `known`."""
    array = _integers(values)
    if array is None or not known:
        return None if values else np.zeros(0, np.int64)
    found = np.searchsorted(known, array).clip(max=len(known) - 1)
    return found if (np.array(known)[found] == array).all() else None


def _numbers(values: list[Any]) -> np.ndarray | None:
    try:
        array = np.array(values, np.float64) if set(map(type, values)) <= {int, float} else None
    except OverflowError:
        return None
    return array if array is not None and (np.abs(array) < _MAX_NUMBER).all() else None


def _annotation_complaint(row: dict[str, Any], image_ids: set[int], category_ids: set[int]) -> str | None:
    for key, known, what in (("image_id", image_ids, "image"), ("category_id", category_ids, "category")):
        if key not in row:
            return f"no key {key!r}; every annotation needs one"
        if not _is_int(row[key]):
            return f"{key} is {show(row[key])}; it must be an integer"
        if row[key] not in known:
            return f"{key} {row[key]} is no {what} of this file; add the {what} or drop the annotation"
    if not _is_int(row.get("id")):
        return f"'id' is {show(row.get('id'))}; it must be an integer"
    if row.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {show(row['iscrowd'])}; it must be 0 or 1"
    if row.get("area") is not None and not _is_number(row["area"]):
        return f"area is {show(row['area'])}; it must be a number"
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"bbox is {show(box)}; it must be four finite numbers x, y, width, height"
    return None


def _repaired(source: str, a: Annotations, images: list[ImageRecord]) -> Annotations:
    if not len(a):
        return a
    size = np.array([[i.width or np.inf, i.height or np.inf] for i in images]).reshape(-1, 2)[a.image_index]
    low, high = a.bbox[:, :2], a.bbox[:, :2] + a.bbox[:, 2:]
    inside_low, inside_high = np.clip(low, 0, size), np.clip(high, 0, size)
    bad = (a.bbox[:, 2:] <= 0).any(1) | (inside_high - inside_low <= 0).any(1)
    outside = ((low < -CLIP_TOLERANCE) | (high > size + CLIP_TOLERANCE)).any(1) & ~bad
    if outside.any():
        whole = np.isclose(a.area, a.bbox[:, 2] * a.bbox[:, 3]) & outside
        a.bbox[outside] = np.concatenate([inside_low, inside_high - inside_low], 1)[outside]
        a.area[whole] = a.bbox[whole, 2] * a.bbox[whole, 3]
        say(f"{source}: {outside.sum()} boxes reached out of the image and were clipped (ids {_some(a.ids[outside])})")
    if bad.any():
        say(f"{source}: {bad.sum()} boxes without an area inside their image were dropped (ids {_some(a.ids[bad])})")
        a = a.select(np.flatnonzero(~bad))
    return a


def _is_text(value: Any, errors: str = "strict") -> TypeGuard[str]:
    """A string of sane length that can be written; `surrogateescape`: a file name, of whatever bytes."""
    try:
        return isinstance(value, str) and 0 < len(value.encode(errors=errors)) <= 1024
    except UnicodeEncodeError:
        return False


def _named(kind: str, position: int, row: dict[str, Any]) -> str:
    return f"{kind} {row['id']}" if _is_int(row.get("id")) else f"{kind} at position {position} of its list"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_INT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER  # nan fails, too


def _duplicate(values: list[Any]) -> list[Any]:
    ordered = sorted(values)
    return [a for a, b in itertools.pairwise(ordered) if a == b][:1]


def _some(ids: np.ndarray) -> str:
    return ", ".join(str(i) for i in ids[:5]) + (", ..." if len(ids) > 5 else "")
