"""Look at every image once before it is used: broken ones are named and left out, odd ones counted."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from softteacher import storage
from softteacher.console import say, track
from softteacher.data.coco import CocoDataset, ImageRecord
from softteacher.data.images import ROTATED, BadImage, decode
from softteacher.errors import UserError


def check_images(dataset: CocoDataset, max_bad: float, title: str = "check images") -> CocoDataset:
    """Read and decode every image of a data set.

    Args:
        dataset: what to check; images of unknown size are fine.
        max_bad: share of broken images that is survived (one always is).
        title: stands before the progress bar.

    Returns:
        The data set without the broken images, with the size of every image.

    Raises:
        UserError: more images are broken than `max_bad` allows, or a `file_name` leaves the root.
    """

    def look(index: int) -> tuple[ImageRecord, list[str]]:
        image, odd = read_image(dataset, index)
        return replace(dataset.images[index], width=image.width, height=image.height), odd

    counts: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    good: list[int] = []
    records = list(dataset.images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(look, i) for i in range(len(dataset))]
        try:
            for index, future in track(enumerate(futures), title, len(futures)):
                try:
                    records[index], odd = future.result()
                    counts.update(odd)
                    good.append(index)
                except (BadImage, storage.MissingFile) as e:
                    broken.append(str(e))
        finally:
            pool.shutdown(cancel_futures=True)  # a store that can't be reached is not asked for every other image
    if rotated := counts.pop(ROTATED, 0):
        say(f"{dataset.source}: {rotated} images have an EXIF rotation; it is ignored, boxes belong to the raw pixels")
    if counts:
        listed = ", ".join(f"{n} {mode}" for mode, n in sorted(counts.items()))
        say(f"{dataset.source}: {counts.total()} images are converted to 8-bit RGB ({listed})")
    report_broken(dataset, broken, max_bad)
    return replace(dataset, images=records).select(good)


def read_image(
    dataset: CocoDataset, index: int, read: Callable[[str], bytes] = storage.read_bytes
) -> tuple[Image.Image, list[str]]:
    """Decode one image (RGB, and what was odd; see `decode`) and compare its size with the json's.

    Raises:
        BadImage: broken, or of another size.
        MissingFile: not there.
    """
    record, uri = dataset.images[index], dataset.uri(index)
    image, odd = decode(read(uri), uri)
    if record.width and image.size != (record.width, record.height):
        raise BadImage(
            f"{uri}: is {image.width} x {image.height}, but image {record.id} of {dataset.source} says "
            f"{record.width} x {record.height}; the boxes would be wrong"
        )
    return image, odd


def report_broken(dataset: CocoDataset, broken: Collection[str], max_bad: float, known: Collection[str] = ()) -> None:
    """Name the broken images of a data set.

    Args:
        dataset: where they are.
        broken: what is wrong with each.
        max_bad: share of the data set that is survived.
        known: those of `broken` that were named before.

    Raises:
        UserError: they are more than the share `max_bad` of it, and more than one.
    """
    if not broken:
        return
    allowed = min(max(1, int(max_bad * len(dataset))), len(dataset) - 1)
    count = f"{len(broken)} of {len(dataset)} images are missing or broken"
    if len(broken) > allowed:
        raise UserError(
            f"{dataset.source}: {count}, {allowed} allowed; first: {min(broken)} "
            "(repair them, or allow more: --max-bad-images of split, setting data.max_bad_images elsewhere)"
        )
    for line in sorted(set(broken) - set(known)):
        say(line)
    say(f"{dataset.source}: {count} and left out")
