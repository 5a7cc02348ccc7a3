"""`CocoDataset`: COCO json + image root + fingerprint. Loading validates everything and says what is wrong where."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from reprlib import repr as show
from typing import Any

import numpy as np
import orjson

from softteacher import storage
from softteacher.data.records import (
    ROOT_RULE,
    Annotations,
    ImageRecord,
    is_root,
    parse_annotations,
    parse_categories,
    parse_images,
    without_gc,
)
from softteacher.errors import UserError


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

    def segmentations(self, index: int) -> list[Any]:
        """The COCO segmentations of an image's `targets`, of a data set that `require_masks` has passed."""
        assert self.annotations.segmentations is not None
        rows = np.arange(self._starts[index], self._starts[index + 1])
        return [self.annotations.segmentations[i] for i in rows[~self.annotations.crowd[rows]].tolist()]

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
        return replace(self, images=[self.images[i] for i in order.tolist()], annotations=annotations)

    def fingerprint(self, masks: bool = False) -> str:
        """sha256 over images, classes and boxes, and if asked for masks; the same wherever the files lie."""
        digest = hashlib.sha256()
        images = ", ".join(f"[{i.id}, {json.dumps(i.file_name)}]" for i in self.images)
        digest.update(f"[{images}]".encode())
        digest.update(json.dumps(self.categories).encode())
        a = self.annotations
        for array in (a.image_index, a.bbox, a.labels, a.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        if masks:
            digest.update(orjson.dumps(a.segmentations))
        return digest.hexdigest()

    @without_gc()
    def to_json(self) -> dict[str, Any]:
        """A COCO json object; the extra key `softteacher` holds root and fingerprint."""
        a = self.annotations
        image_ids, category_ids = [i.id for i in self.images], [i for i, _ in self.categories]
        columns = (a.ids, a.image_index, a.labels, a.bbox, a.area, a.crowd.astype(np.int64))
        annotations: list[dict[str, Any]] = [
            {
                "id": row,
                "image_id": image_ids[index],
                "category_id": category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
            }
            for row, index, label, box, area, crowd in zip(*(c.tolist() for c in columns), strict=True)
        ]
        if a.segmentations:
            for record, segmentation in zip(annotations, a.segmentations, strict=True):
                record["segmentation"] = segmentation
        images = []
        for i in self.images:
            sizes = {"width": i.width, "height": i.height} if i.width else {}
            extra = ({"root": i.root} if i.root else {}) | ({"new": True} if i.new else {})
            images.append({"id": i.id, "file_name": i.file_name, **sizes, **extra})
        return {
            "softteacher": {"root": self.root, "fingerprint": self.fingerprint()},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in self.categories],
        }

    def save(self, path: str | Path) -> None:
        """Write the manifest."""
        tree = self.to_json()
        try:
            data = orjson.dumps(tree)
        except TypeError:  # a file name that isn't valid Unicode
            data = json.dumps(tree).encode()
        storage.write_bytes(path, data)


@without_gc()
def load_coco(source: str | Path, root: str | None = None, *, labeled: bool = True) -> CocoDataset:
    """Read and validate a COCO json or one of our manifests.

    Args:
        source: the json, local or `s3://`.
        root: image folder or prefix; by default what the manifest says, else it is looked for beside the json.
        labeled: boxes must exist, and the sizes of images that have some; otherwise annotations, categories and sizes
            are optional.

    Returns:
        The data set. Degenerate boxes are dropped and boxes outside the image clipped, with a line that counts them.

    Raises:
        UserError: one line with file, id, what is wrong and what to do.
    """
    source = str(source)
    raw = storage.read_bytes(source)
    try:
        tree = _loads(raw)
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
    rows = tree.get("annotations", [])
    categories = parse_categories(source, tree.get("categories", []), rows)
    if labeled and not categories:
        raise UserError(f"{source}: no categories in it; list the classes under 'categories'")
    # labelling tools don't know the size of an image that nobody has drawn in
    boxed = {i for i in (row.get("image_id") for row in rows) if isinstance(i, int)} if labeled else set()
    images = parse_images(source, tree["images"], boxed)
    annotations = parse_annotations(source, rows, images, categories)
    if labeled and not (~annotations.crowd).any():
        why = (
            "all are iscrowd = 1, regions that teach nothing; set it to 0"
            if len(annotations)
            else "check the annotations"
        )
        raise UserError(f"{source}: not one labelled box in it, a detector needs some; {why}")
    if root is None and "softteacher" in tree:
        root = tree["softteacher"].get("root") if isinstance(tree["softteacher"], dict) else None
        if not is_root(root):
            raise UserError(f"{source}: 'softteacher' is {show(tree['softteacher'])}; {ROOT_RULE}")
    return CocoDataset(images, categories, annotations, root or find_images(source, images), source)


def _loads(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError:  # the slow parser takes NaN and UTF-16, too, and says better where a file is broken
        return json.loads(raw)


def require_same_classes(a: CocoDataset, b: CocoDataset) -> None:
    """Both data sets must have the same categories.

    Raises:
        UserError: they differ; says in what.
    """
    require_classes(a, b.categories, b.source, "use one list in both files")


def require_classes(dataset: CocoDataset, categories: list[tuple[int, str]], whose: str, advice: str) -> None:
    """A data set must have the given categories.

    Raises:
        UserError: it has others; says which, and `advice`.
    """
    if dataset.categories != categories:
        odd = sorted(set(dataset.categories) ^ set(categories))[:3]
        raise UserError(f"{dataset.source} and {whose}: the class sets differ (e.g. {odd}); {advice}")


@without_gc()
def add_labeled(dataset: CocoDataset, more: CocoDataset, first: int) -> CocoDataset:
    """A data set with the images and boxes of another one of the same classes added.

    Args:
        dataset: keeps its ids.
        more: what is added.
        first: id of its first image, larger than any of `dataset`.
    """
    images = [replace(i, id=first + n, root=i.root or more.root) for n, i in enumerate(more.images)]
    a, b = dataset.annotations, more.annotations
    masks = (a.segmentations or [[]] * len(a)) + (b.segmentations or [[]] * len(b))
    annotations = Annotations(
        np.concatenate([a.image_index, b.image_index + len(dataset)]),
        np.concatenate([a.bbox, b.bbox]),
        np.concatenate([a.labels, b.labels]),
        np.concatenate([a.area, b.area]),
        np.concatenate([a.crowd, b.crowd]),
        np.concatenate([a.ids, np.arange(len(b)) + a.ids.max(initial=0) + 1]),
        masks if a.segmentations or b.segmentations else None,
    )
    return replace(dataset, images=dataset.images + images, annotations=annotations)


def find_images(source: str, images: list[ImageRecord]) -> str:
    """The image folder or prefix that belongs to a COCO json, by the layouts that people use.

    Raises:
        UserError: no image of the json is in any of them.
    """
    path = source if storage.is_s3(source) else os.path.normpath(Path(source).absolute())
    folder, name = path.rsplit("/", 1)
    split = PurePosixPath(name).stem.removeprefix("instances_").removeprefix("image_info_")
    base = folder.rsplit("/", 1)[0] if "/" in folder.removeprefix("s3://") else folder  # not above a bucket
    places = [f"{base}/images/{split}", f"{base}/images", f"{base}/{split}", base, f"{folder}/images", folder]
    some = [images[n] for n in spread(len(images))]
    for place in places:
        if not images or (
            storage.exists(place) and any(storage.exists(storage.join(place, i.file_name)) for i in some)
        ):
            return place or "/"
    raise UserError(f"{source}: its images are not found (looked in {', '.join(places)}); put them into {places[1]}")


def spread(count: int, most: int = 20) -> range:
    """Some of `count` positions, from all over them: the first images of a list may be those that have gone."""
    return range(0, count, max(1, -(-count // most)))
