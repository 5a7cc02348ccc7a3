"""Which images a user means: files, folders, globs and `s3://` prefixes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from softteacher import storage
from softteacher.data.images import SUFFIXES
from softteacher.data.records import file_name_complaint
from softteacher.errors import MissingFile, UserError


class Source(NamedTuple):
    """An image: where it is, and its path below the deepest folder that holds all images of the call."""

    uri: str
    name: str


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """The images that are meant, each once, in the order of the inputs, those of a folder by name.

    Args:
        inputs: files; folders and `s3://` prefixes, which are searched to any depth for names that end as images' do
            (`softteacher.data.images.SUFFIXES`); local globs, `**` for any depth.

    Raises:
        UserError: a local file is missing, a folder or glob has no images, or there is no image at all.
    """
    found: dict[str, str] = {}  # by URI, the folder it was looked for in
    for item in inputs:
        for uri, base in _expand(item):
            found.setdefault(uri, base)
    if not found:
        raise UserError("no images to look at; give files, folders, globs or s3:// prefixes")
    # s3://bucket/key as the path /s3:/bucket/key, so that one rule serves both
    common = os.path.commonpath({_path(base) for base in found.values()}).rstrip("/")
    return [Source(uri, _path(uri)[len(common) + 1 :]) for uri in found]


def _expand(item: str) -> Iterator[tuple[str, str]]:
    found: list[tuple[str, str]]
    if storage.is_s3(item):
        parent, _, key = item.rpartition("/")
        found = [] if item.lower().endswith(SUFFIXES) else _search(item)
        if not found and key and (item.lower().endswith(SUFFIXES) or storage.etag(item)):
            found = [(item, parent)]
    elif Path(item).is_dir():
        found = _search(item)
    elif Path(item).exists():
        found = [(item, os.path.dirname(item))]  # noqa: PTH120
    elif glob.has_magic(item):
        matches = sorted(glob.glob(item, recursive=True))  # noqa: PTH207
        folders = [m for m in matches if Path(m).is_dir()]
        below = () if "**" in item else (pair for folder in folders for pair in _search(folder))
        files = [m for m in matches if m.lower().endswith(SUFFIXES) and m not in folders]
        found = [*((m, os.path.dirname(m)) for m in files), *below]  # noqa: PTH120
    else:
        raise MissingFile(f"{item}: no such file or folder; check the path")
    if not found:
        raise UserError(f"{item}: no images in it ({', '.join(SUFFIXES)}); check the path")
    yield from found


def _search(folder: str) -> list[tuple[str, str]]:
    names = [f.name for f in storage.list_files(folder) if f.name.lower().endswith(SUFFIXES)]
    if complaint := next(filter(None, map(file_name_complaint, names)), None):  # pictures are written by these names
        raise UserError(f"{folder}: {complaint}")
    return [(storage.join(folder, name), folder) for name in names]


def _path(uri: str) -> str:
    return f"/{uri.rstrip('/').replace('//', '/', 1)}" if storage.is_s3(uri) else os.path.abspath(uri)  # noqa: PTH100
