"""Has a data set changed? Told from its listing, without reading an image."""

from __future__ import annotations

import hashlib

from softteacher import storage
from softteacher.errors import UserError


def fingerprint(data: str, unlabeled: str | None = None) -> str:
    """A hash that changes with everything that `split` makes of the data: the json files, and which images there are.

    Args:
        data: folder or `s3://` prefix with `images/` and `annotations/`, or a COCO json.
        unlabeled: further images that have no json, folder or prefix.

    Returns:
        sha256 of the names and sizes of all files, and of what the json files contain (on S3: of their etags).

    Raises:
        UserError: there is nothing, or it can't be read.
    """
    digest = hashlib.sha256()
    for source in filter(None, (data, unlabeled)):
        files = (
            [("", 0)]
            if source.endswith(".json")
            else [(f.name, f.size) for f in storage.list_files(source, follow=True)]
        )
        if not files:
            raise UserError(f"{source}: no such folder or prefix, or it is empty; check the path")
        for name, size in files:
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
            if (name or source).endswith(".json"):
                uri = storage.join(source, name) if name else source
                digest.update((storage.etag(uri) or hashlib.sha256(storage.read_bytes(uri)).hexdigest()).encode())
    return digest.hexdigest()
