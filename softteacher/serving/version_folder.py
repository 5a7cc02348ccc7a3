"""A version's folder in the model repository: whole if its manifest, written last, is there and fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softteacher import storage
from softteacher.errors import UserError
from softteacher.serving.repository import Champion, versions

MANIFEST = "manifest.json"
FIRST = "smoke.npz"  # written first: by it, a folder without a manifest is known as ours


@dataclass(frozen=True)
class Manifest:
    """What a version folder must hold.

    Attributes:
        record: the champion pointer of its deployment: who, when, what, how good.
        files: `sha256` and `size` (bytes) of each of its other files.
    """

    record: Champion
    files: dict[str, dict[str, Any]]


def write_version(uri: str, files: Mapping[str, Path | bytes], record: Champion) -> None:
    """Write a version folder: the smoke test's images first, the manifest last.

    Args:
        uri: of the folder.
        files: local files, or contents, by the names they get.
        record: for the manifest.

    Raises:
        UserError: it can't be written.
    """
    sums = {}
    for name in sorted(files, key=_order):
        source = files[name]
        if isinstance(source, bytes):
            sums[name] = {"sha256": hashlib.sha256(source).hexdigest(), "size": len(source)}
            storage.write_bytes(storage.join(uri, name), source)
        else:
            sums[name] = _sum(source)
            storage.copy(source, storage.join(uri, name))
    storage.write_bytes(storage.join(uri, MANIFEST), json.dumps(asdict(Manifest(record, sums)), indent=1).encode())


def copy_version(source: str, target: str) -> None:
    """Copy a version folder inside the repository, in the order of `write_version`."""
    for name in sorted((file.name for file in storage.list_files(source)), key=_order):
        storage.copy(storage.join(source, name), storage.join(target, name))


@contextmanager
def open_version(uri: str) -> Iterator[tuple[Manifest, Path]]:
    """The manifest of a version and a local folder with its files, read back and checked against the manifest.

    Raises:
        UserError: it has no manifest, or a file is missing or not the one that was deployed.
    """
    manifest = read_manifest(uri)
    if manifest is None:
        raise UserError(f"{uri}: no {MANIFEST}, so the version is not whole; it was not deployed to the end")
    with storage.local_input(uri) as folder:
        for name, expected in manifest.files.items():
            if not (folder / name).is_file():
                raise UserError(f"{uri}: {name} is missing; deploy that model again")
            if _sum(folder / name) != expected:
                raise UserError(f"{uri}: {name} is not what was deployed (its sha256 differs from {MANIFEST})")
        yield manifest, folder


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of a version folder; none if the version is not whole.

    Raises:
        UserError: it can't be read, or is torn.
    """
    try:
        value = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        return Manifest(Champion.from_tree(value["record"]), value["files"])
    except storage.MissingFile:
        return None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{uri}/{MANIFEST}: torn, or not ours; deploy that model again") from None


def incomplete_versions(repository: str, name: str) -> list[int]:
    """The versions without a manifest: what killed deployments left.

    Raises:
        UserError: a folder is none of ours.
    """
    folder = storage.join(repository, name)
    there = {file.name for file in storage.list_files(folder)}
    found = [version for version in versions(repository, name) if f"{version}/{MANIFEST}" not in there]
    if foreign := [version for version in found if f"{version}/{FIRST}" not in there]:
        raise UserError(
            f"{folder}: holds a model that `softteacher deploy` did not put there (version {foreign[0]});"
            " choose another --name"
        )
    return found


def _order(name: str) -> tuple[bool, bool, str]:
    return name != FIRST, name == MANIFEST, name


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as f:
        return {"sha256": hashlib.file_digest(f, "sha256").hexdigest(), "size": file.stat().st_size}
