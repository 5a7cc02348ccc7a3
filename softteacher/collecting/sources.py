"""Where a round's images and labels lie: listed, not read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from softteacher import storage
from softteacher.collecting.table import ImageTable
from softteacher.console import say
from softteacher.data.coco import CocoDataset, load_coco, spread
from softteacher.data.images import SUFFIXES
from softteacher.data.records import file_name_complaint
from softteacher.errors import UserError

PARTS = ("labeled", "unlabeled", "validation")


def find_labels(labels: Sequence[str]) -> list[str]:
    """The label files among files, folders and prefixes, each once, in the given order and by name in a folder."""
    found: list[str] = []
    for uri in labels:
        if uri.endswith(".json"):
            found.append(uri)
            continue
        names = [f.name for f in storage.list_files(uri) if f.name.endswith(".json")]
        if not names:
            say(f"{uri}: no labels (*.json) there yet")
        found += [storage.join(uri, name) for name in names]
    return list(dict.fromkeys(found))


def load_labels(uri: str, source: str) -> CocoDataset:
    """Labels whose images are where the json says, beside it, or in `source`.

    Raises:
        UserError: they can't be read.
    """
    try:
        return load_coco(uri)
    except UserError as first:
        try:
            dataset = load_coco(uri, source)
        except UserError:
            raise first from None
        if not any(storage.exists(dataset.uri(n)) for n in spread(len(dataset))):
            raise UserError(f"{first}, or into {source}") from None
        return dataset


def place(root: str, name: str) -> str:
    """Where an image lies, in the same words however a json has it.

    `./a.jpg` or `x//a.jpg` is another way to write a path on a disk; on S3 it is another key.
    """
    uri = storage.join(root, name)
    return uri if storage.is_s3(uri) else str(PurePosixPath(uri))  # which leaves `..`, for it may follow a link


def list_images(source: str, datasets: Sequence[CocoDataset]) -> tuple[ImageTable, int]:
    """The images of the source and of the data sets that are there, sorted by URI; and how many files are no images."""
    listed: dict[str, tuple[str, int, str]] = {}  # etag, size, fault
    ignored = 0
    real = os.path.realpath(source)
    for file in storage.list_files(source):
        if not file.name.lower().endswith(SUFFIXES):
            ignored += 1
            continue
        uri, fault = storage.join(source, file.name), ""
        if complaint := file_name_complaint(file.name):
            fault = f"{uri}: {complaint}"
        elif not file.size:
            fault = f"{uri}: empty file; replace or remove it"
        elif not storage.is_s3(uri) and not Path(os.path.realpath(uri)).is_relative_to(real):
            fault = f"{uri}: leaves the source by a link; copy the file into it"
        listed[uri] = file.etag, file.size, fault
    wanted = {place(i.root or d.root, i.file_name) for d in datasets for i in d.images} - set(listed)
    for root in sorted({i.root or d.root for d in datasets for i in d.images}) if wanted else []:
        for file in storage.list_files(root):
            if (uri := place(root, file.name)) in wanted:
                listed[uri] = file.etag, file.size, ""
    uris = sorted(listed)
    table = ImageTable.of(uris, [listed[uri][0] for uri in uris], [listed[uri][1] for uri in uris])
    table.faults = [listed[uri][2] for uri in uris]
    return table, ignored
