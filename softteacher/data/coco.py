"""`CocoDataset`: COCO json + image root + fingerprint. Loading validates everything and says what is wrong where."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from reprlib import repr as show
from typing import Any, TypeGuard

import numpy as np

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError

CLIP_TOLERANCE = 1.0  # pixels; labelling tools round, and a box that is hardly outside must score as it is written


@dataclass(slots=True)
class ImageRecord:
    """One image; width and height are 0 where no json told them, `root` is set where it isn't the data set's own."""

    id: int
    file_name: str
    width: int = 0
    height: int = 0
    root: str | None = None


@dataclass(slots=True)
class Annotations:
    """The boxes of all images, sorted by image.

    Attributes:
        image_index: [N] int64, index into the images.
        bbox: [N, 4] float64, xywh in pixels as the json has them (so that scores equal pycocotools' to the last digit).
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
            self.segmentations and [self.segmentations[i] for i in keep],
        )


@dataclass
class CocoDataset:
    """A COCO data set: what every step takes and hands on. The images stay where they are.

    Attributes:
        images: sorted by id.
        categories: (COCO category id, name), sorted by id; a label is an index into this list.
        annotations: all boxes.
        root: folder or `s3://` prefix that `file_name` is relative to.
        source: where the json came from, for messages.
    """

    images: list[ImageRecord]
    categories: list[tuple[int, str]]
    annotations: Annotations
    root: str
    source: str = "data set"
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = np.searchsorted(self.annotations.image_index, np.arange(len(self.images) + 1))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> list[str]:
        """The class names in label order."""
        return [name for _, name in self.categories]

    def targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (xyxy, pixels, float64 [n, 4]) and labels ([n]) of an image, crowd regions left out."""
        rows = slice(self._starts[index], self._starts[index + 1])
        keep = ~self.annotations.crowd[rows]
        box = self.annotations.bbox[rows][keep]
        return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1), self.annotations.labels[rows][keep]

    def uri(self, index: int) -> str:
        """Where an image lies.

        Raises:
            UserError: a link leads out of the root.
        """
        record = self.images[index]
        root = record.root or self.root
        uri = storage.join(root, record.file_name)
        if not storage.is_s3(root) and not Path(os.path.realpath(uri)).is_relative_to(os.path.realpath(root)):
            raise UserError(
                f"{self.source}: image {record.id}: file_name {record.file_name!r} leaves the image folder by a link; "
                "copy the file into it"
            )
        return uri

    def class_counts(self) -> dict[str, int]:
        """Boxes per class, crowd regions left out."""
        counts = np.bincount(self.annotations.labels[~self.annotations.crowd], minlength=len(self.categories))
        return {name: int(n) for name, n in zip(self.classes, counts, strict=True)}

    def select(self, indices: Sequence[int] | np.ndarray) -> CocoDataset:
        """The data set with only the images at the given positions (and their boxes)."""
        order = np.unique(np.asarray(indices, dtype=np.int64))
        new_index = np.full(len(self.images), -1, np.int64)
        new_index[order] = np.arange(len(order))
        mapped = new_index[self.annotations.image_index]
        annotations = self.annotations.select(np.flatnonzero(mapped >= 0))
        annotations.image_index = mapped[mapped >= 0]
        return replace(self, images=[self.images[i] for i in order], annotations=annotations)

    def fingerprint(self) -> str:
        """sha256 over images, classes and boxes; the same wherever the files lie."""
        digest = hashlib.sha256()
        digest.update(json.dumps([[i.id, i.file_name] for i in self.images]).encode())
        digest.update(json.dumps(self.categories).encode())
        a = self.annotations
        for array in (a.image_index, a.bbox, a.labels, a.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A COCO json object; the extra key `softteacher` holds root and fingerprint."""
        a = self.annotations
        image_ids = [i.id for i in self.images]
        annotations = [
            {
                "id": int(a.ids[i]),
                "image_id": image_ids[a.image_index[i]],
                "category_id": self.categories[a.labels[i]][0],
                "bbox": a.bbox[i].tolist(),
                "area": float(a.area[i]),
                "iscrowd": int(a.crowd[i]),
                **({"segmentation": a.segmentations[i]} if a.segmentations else {}),
            }
            for i in range(len(a))
        ]
        images = []
        for i in self.images:
            sizes = {"width": i.width, "height": i.height} if i.width else {}
            images.append({"id": i.id, "file_name": i.file_name, **sizes, **({"root": i.root} if i.root else {})})
        return {
            "softteacher": {"root": self.root, "fingerprint": self.fingerprint()},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in self.categories],
        }

    def save(self, path: str | Path) -> None:
        """Write the manifest."""
        storage.write_bytes(path, json.dumps(self.to_json()).encode())


def load_coco(source: str | Path, root: str | None = None, *, labeled: bool = True) -> CocoDataset:
    """Read and validate a COCO json or one of our manifests.

    Args:
        source: the json, local or `s3://`.
        root: image folder or prefix; by default what the manifest says, else it is looked for beside the json.
        labeled: boxes must exist; otherwise annotations, categories and sizes are optional.

    Returns:
        The data set. Degenerate boxes are dropped and boxes outside the image clipped, with a line that counts them.

    Raises:
        UserError: one line with file, id, what is wrong and what to do.
    """
    source = str(source)
    raw = storage.read_bytes(source)
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}: broken json ({str(e).splitlines()[0]}); write the file again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: holds {show(tree)}; a COCO json is an object with images, annotations, categories")
    for key in ("images", "annotations", "categories"):
        if key not in tree and (labeled or key == "images"):
            raise UserError(f"{source}: no key {key!r}; a COCO json has images, annotations and categories")
        rows = tree.get(key, [])
        odd = [rows] if not isinstance(rows, list) else [x for x in rows if not isinstance(x, dict)]
        if odd:
            raise UserError(f"{source}: {key!r} must be a list of objects, not {show(odd[0])}; write the file again")
    if labeled and not tree["images"]:
        raise UserError(f"{source}: no images in it; take a data set that has some")
    categories = _categories(source, tree.get("categories", []))
    if labeled and not categories:
        raise UserError(f"{source}: no categories in it; list the classes under 'categories'")
    images = _images(source, tree["images"], labeled)
    annotations = _annotations(source, tree.get("annotations", []), images, categories)
    if labeled and not (~annotations.crowd).any():
        raise UserError(f"{source}: not one labelled box in it; a detector needs some, check the annotations")
    if root is None and "softteacher" in tree:
        root = tree["softteacher"].get("root") if isinstance(tree["softteacher"], dict) else None
        if not _is_root(root):
            raise UserError(f"{source}: 'softteacher' is {show(tree['softteacher'])}; {_ROOT_RULE}")
    return CocoDataset(images, categories, annotations, root or find_images(source, images), source)


def require_same_classes(a: CocoDataset, b: CocoDataset) -> None:
    """Both data sets must have the same categories.

    Raises:
        UserError: they differ; says in what.
    """
    if a.categories != b.categories:
        odd = sorted(set(a.categories) ^ set(b.categories))[:3]
        raise UserError(f"{a.source} and {b.source}: the class sets differ (e.g. {odd}); use one list in both files")


def find_images(source: str, images: list[ImageRecord]) -> str:
    """The image folder or prefix that belongs to a COCO json, by the layouts that people use.

    Raises:
        UserError: no image of the json is in any of them.
    """
    folder, name = source.rsplit("/", 1) if "/" in source else (".", source)
    split = PurePosixPath(name).stem.removeprefix("instances_").removeprefix("image_info_")
    base = folder.rsplit("/", 1)[0] if "/" in folder.removeprefix("s3://") else "."
    places = [f"{base}/images/{split}", f"{base}/images", f"{base}/{split}", base, f"{folder}/images", folder]
    for place in places:
        if not images or any(storage.exists(storage.join(place, i.file_name)) for i in images[:5]):
            return place if storage.is_s3(place) else str(Path(place).absolute())
    raise UserError(f"{source}: its images are not found (looked in {', '.join(places)}); put them into {places[1]}")


def _categories(source: str, rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    for n, row in enumerate(rows):
        if not _is_int(row.get("id")) or not _is_text(row.get("name")):
            raise UserError(f"{source}: {_named('category', n, row)}: needs an integer 'id' and a string 'name'")
    found = sorted((row["id"], row["name"]) for row in rows)
    for what, values in (("id", [i for i, _ in found]), ("name", [n for _, n in found])):
        if twice := _duplicate(values):
            raise UserError(f"{source}: category {what} {twice[0]!r} occurs twice; make it unique")
    return found


def _images(source: str, rows: list[dict[str, Any]], labeled: bool) -> list[ImageRecord]:
    images = []
    for n, row in enumerate(rows):
        where = f"{source}: {_named('image', n, row)}"
        if not _is_int(row.get("id")):
            raise UserError(f"{where}: 'id' is {show(row.get('id'))}; it must be an integer")
        name = row.get("file_name")
        if not _is_text(name, "surrogateescape"):
            raise UserError(f"{where}: file_name is {show(name)}; it must be the path of a file in the image folder")
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
            raise UserError(f"{where}: file_name {name!r} leaves the image folder; write it relative to that folder")
        if labeled or "width" in row or "height" in row:
            for key in ("width", "height"):
                if not _is_int(row.get(key)) or row[key] <= 0:
                    raise UserError(f"{where}: {key!r} is {show(row.get(key))}; it must be a positive integer")
        if row.get("root") is not None and not _is_root(row["root"]):
            raise UserError(f"{where}: 'root' is {show(row['root'])}; {_ROOT_RULE}")
        images.append(ImageRecord(row["id"], name, row.get("width", 0), row.get("height", 0), row.get("root")))
    images.sort(key=lambda i: i.id)
    if twice := _duplicate([i.id for i in images]):
        raise UserError(f"{source}: image id {twice[0]} occurs twice; make the ids unique")
    return images


def _annotations(
    source: str, rows: list[dict[str, Any]], images: list[ImageRecord], categories: list[tuple[int, str]]
) -> Annotations:
    index = {image.id: n for n, image in enumerate(images)}
    label = {i: n for n, (i, _) in enumerate(categories)}
    for n, row in enumerate(rows):
        if not _well_formed(row, index, label):
            raise UserError(f"{source}: {_named('annotation', n, row)}: {_complaint(row, index, label)}")
    n = len(rows)
    image_index = np.fromiter((index[r["image_id"]] for r in rows), np.int64, n)
    order = np.argsort(image_index, kind="stable")
    bbox = np.array([r["bbox"] for r in rows], np.float64).reshape(n, 4)
    annotations = Annotations(
        image_index,
        bbox,
        np.fromiter((label[r["category_id"]] for r in rows), np.int64, n),
        np.fromiter((r["area"] if "area" in r else r["bbox"][2] * r["bbox"][3] for r in rows), np.float64, n),
        np.fromiter((r.get("iscrowd", 0) for r in rows), bool, n),
        np.fromiter((r["id"] for r in rows), np.int64, n),
        [r.get("segmentation", []) for r in rows] if any(r.get("segmentation") for r in rows) else None,
    ).select(order)
    if twice := _duplicate(annotations.ids.tolist()):
        raise UserError(f"{source}: annotation id {twice[0]} occurs twice; make the ids unique")
    return _repaired(source, annotations, images)


def _repaired(source: str, a: Annotations, images: list[ImageRecord]) -> Annotations:
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


def _well_formed(row: dict[str, Any], index: dict[int, int], label: dict[int, int]) -> bool:
    box = row.get("bbox")
    return (
        _is_int(row.get("id"))
        and _is_int(row.get("image_id"))
        and row["image_id"] in index
        and _is_int(row.get("category_id"))
        and row["category_id"] in label
        and isinstance(box, list)
        and len(box) == 4
        and all(_is_number(v) for v in box)
        and row.get("iscrowd", 0) in (0, 1)
        and _is_number(row.get("area", 0))
    )


def _complaint(row: dict[str, Any], index: dict[int, int], label: dict[int, int]) -> str:
    for key, known, what in (("image_id", index, "image"), ("category_id", label, "category")):
        if key not in row:
            return f"no key {key!r}; every annotation needs one"
        if not _is_int(row[key]):
            return f"{key} is {show(row[key])}; it must be an integer"
        if row[key] not in known:
            return f"{key} {row[key]} is no {what} of this file; add the {what} or drop the annotation"
    if not _is_int(row.get("id")):
        return f"'id' is {show(row.get('id'))}; it must be an integer"
    if row.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {show(row['iscrowd'])}; it must be 0 or 1"
    if not _is_number(row.get("area", 0)):
        return f"area is {show(row['area'])}; it must be a number"
    return f"bbox is {show(row.get('bbox'))}; it must be four finite numbers x, y, width, height"


_ROOT_RULE = "its 'root' must be an absolute path or an s3:// URI; run `softteacher split` again"


def _is_root(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith(("/", "s3://")) and "\0" not in value


def _is_text(value: Any, errors: str = "strict") -> TypeGuard[str]:
    """A string of sane length that can be written; `surrogateescape`: a file name, of whatever bytes."""
    try:
        return isinstance(value, str) and 0 < len(value.encode(errors=errors)) <= 1024
    except UnicodeEncodeError:
        return False


def _named(kind: str, position: int, row: dict[str, Any]) -> str:
    return f"{kind} {row['id']}" if _is_int(row.get("id")) else f"{kind} at position {position} of its list"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # nan fails, too


def _duplicate(values: list[Any]) -> list[Any]:
    ordered = sorted(values)
    return [a for a, b in itertools.pairwise(ordered) if a == b][:1]


def _some(ids: np.ndarray) -> str:
    return ", ".join(str(i) for i in ids[:5]) + (", ..." if len(ids) > 5 else "")
