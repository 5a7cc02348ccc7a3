"""Look at every image once before it is used: broken ones are named and left out, odd ones counted."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from softteacher import storage
from softteacher.console import say, track
from softteacher.data.coco import CocoDataset, ImageRecord
from softteacher.data.images import BadImage, decode
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

    def look(index: int) -> tuple[ImageRecord, str]:
        image, mode = read_image(dataset, index)
        return replace(dataset.images[index], width=image.width, height=image.height), mode

    modes: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    good: list[int] = []
    records = list(dataset.images)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(look, i) for i in range(len(dataset))]
        for index, future in track(enumerate(futures), title, len(futures)):
            try:
                records[index], mode = future.result()
                modes[mode] += 1
                good.append(index)
            except (BadImage, storage.MissingFile) as e:
                broken.append(str(e))
    converted = {mode: n for mode, n in modes.items() if mode != "RGB"}
    if converted:
        listed = ", ".join(f"{n} {mode}" for mode, n in sorted(converted.items()))
        say(f"{dataset.source}: {sum(converted.values())} images are converted to 8-bit RGB ({listed})")
    report_broken(dataset, broken, max_bad)
    return replace(dataset, images=records).select(good)


def read_image(
    dataset: CocoDataset, index: int, read: Callable[[str], bytes] = storage.read_bytes
) -> tuple[Image.Image, str]:
    """Decode one image (RGB, and the mode it was stored in) and compare its size with the json's.

    Raises:
        BadImage: broken, or of another size.
        MissingFile: not there.
    """
    record, uri = dataset.images[index], dataset.uri(index)
    image, mode = decode(read(uri), uri)
    if record.width and image.size != (record.width, record.height):
        raise BadImage(
            f"{uri}: is {image.width} x {image.height}, but image {record.id} of {dataset.source} says "
            f"{record.width} x {record.height}; the boxes would be wrong"
        )
    return image, mode


def report_broken(dataset: CocoDataset, broken: list[str], max_bad: float) -> None:
    """Name the broken images of a data set.

    Raises:
        UserError: they are more than the share `max_bad` of it, and more than one.
    """
    if not broken:
        return
    allowed = max(1, int(max_bad * len(dataset)))
    count = f"{len(broken)} of {len(dataset)} images are missing or broken"
    if len(broken) > allowed or len(broken) == len(dataset):
        raise UserError(
            f"{dataset.source}: {count}, {allowed} allowed; first: {broken[0]} "
            "(repair them, or raise data.max_bad_images)"
        )
    for line in broken[:10]:
        say(line)
    say(f"{dataset.source}: {count} and left out")
