"""Look at images before they are used: broken ones are named and left out, odd ones counted."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from PIL import Image

from softteacher import storage
from softteacher.console import say, track
from softteacher.data.coco import CocoDataset
from softteacher.data.images import ROTATED, BadImage, decode, original_size
from softteacher.data.records import ImageRecord
from softteacher.errors import UserError
from softteacher.processors import cpu_count

MOST = 10_000  # images that are looked at: of a larger data set a sample, for training itself survives broken images
THREADS = 8  # that read, even on one processor: of a store they wait for most of their time


def check_images(
    dataset: CocoDataset,
    max_bad: float,
    title: str = "check images",
    read: Callable[[str], bytes] = storage.read_bytes,
) -> CocoDataset:
    """Read and decode every image of a data set, or of one larger than `MOST` a random sample (always the same).

    Of a labelled one those of unknown size are always in the sample.

    Args:
        dataset: what to check; images of unknown size are fine.
        max_bad: share of broken images, of those looked at, that is survived (one always is).
        title: stands before the progress bar.
        read: gives the bytes of an image file, from several threads.

    Returns:
        The data set without the broken images, with the size of every image that was looked at.

    Raises:
        UserError: more images are broken than `max_bad` allows, or a `file_name` leaves the root.
    """

    def look(index: int) -> tuple[ImageRecord, list[str]]:
        # read whole, but not blown up to all its pixels
        image, odd = read_image(dataset, index, read=read, short_side=1)
        width, height = original_size(image)
        return replace(dataset.images[index], width=width, height=height), odd

    chosen: Sequence[int] = range(len(dataset))
    if len(dataset) > MOST:
        unknown = [n for n, i in enumerate(dataset.images) if not i.width] if dataset.categories else []
        chosen = sorted({*random.Random(0).sample(chosen, MOST), *unknown})
        say(f"{dataset.source}: {len(chosen)} of its {len(dataset)} images are looked at now, drawn at random")
    counts: collections.Counter[str] = collections.Counter()
    broken: dict[int, str] = {}
    records = list(dataset.images)
    with ThreadPoolExecutor(max(THREADS, cpu_count())) as pool:
        futures = [pool.submit(look, i) for i in chosen]
        try:
            for index, future in track(zip(chosen, futures, strict=True), title, len(futures)):
                try:
                    records[index], odd = future.result()
                    counts.update(odd)
                except (BadImage, storage.MissingFile) as e:
                    broken[index] = str(e)
        finally:
            pool.shutdown(cancel_futures=True)  # a store that can't be reached is not asked for every other image
    if rotated := counts.pop(ROTATED, 0):
        say(f"{dataset.source}: {rotated} images have an EXIF rotation; it is ignored, boxes belong to the raw pixels")
    if counts:
        listed = ", ".join(f"{n} {mode}" for mode, n in sorted(counts.items()))
        say(f"{dataset.source}: {counts.total()} images are converted to 8-bit RGB ({listed})")
    report_broken(dataset, broken.values(), max_bad, looked_at=len(chosen))
    checked = replace(dataset, images=records)
    return checked.select(np.delete(np.arange(len(dataset)), list(broken))) if broken else checked


def read_image(
    dataset: CocoDataset,
    index: int,
    read: Callable[[str], bytes] = storage.read_bytes,
    short_side: int | None = None,
) -> tuple[Image.Image, list[str]]:
    """Decode one image (RGB, and what was odd; `short_side` as for `decode`) and compare its size with the json's.

    Raises:
        BadImage: broken, or of another size.
        MissingFile: not there.
    """
    record, uri = dataset.images[index], dataset.uri(index)
    image, odd = decode(read(uri), uri, short_side)
    width, height = original_size(image)
    if record.width and (width, height) != (record.width, record.height):
        turned = ROTATED in odd and (height, width) == (record.width, record.height)
        raise BadImage(
            f"{uri}: is {width} x {height}, but image {record.id} of {dataset.source} says "
            f"{record.width} x {record.height}; the boxes would be wrong"
            + " (it was labelled as its EXIF rotation shows it; turn the pixels, e.g. mogrify -auto-orient)"
            * turned
        )
    return image, odd


def report_broken(
    dataset: CocoDataset,
    broken: Collection[str],
    max_bad: float,
    known: Collection[str] = (),
    looked_at: int | None = None,
) -> None:
    """Name the broken images of a data set.

    Args:
        dataset: where they are.
        broken: what is wrong with each.
        max_bad: share of the data set that is survived.
        known: those of `broken` that were named before.
        looked_at: number of its images that `broken` is of; by default all.

    Raises:
        UserError: they are more than the share `max_bad` of it, and more than one.
    """
    if not broken:
        return
    total = len(dataset) if looked_at is None else looked_at
    allowed = min(max(1, int(max_bad * total)), total - 1)
    count = f"{len(broken)} of {total} images are missing or broken"
    if len(broken) > allowed:
        raise UserError(
            f"{dataset.source}: {count}, {allowed} allowed; first: {min(broken)} "
            "(repair them, or allow more: --max-bad-images of split, setting data.max_bad_images elsewhere)"
        )
    for line in sorted(set(broken) - set(known)):
        say(line)
    say(f"{dataset.source}: {count} and left out")
