"""What is known of many images, in columns: a million of them is some hundred megabytes in memory, less on the disk."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.collecting.hashes import BYTES
from softteacher.errors import UserError


@dataclass
class ImageTable:
    """One row for each image. An image is known when it has a sha256 or a fault.

    Attributes:
        uris: where it lies.
        etags: what it was when it was listed.
        faults: what is wrong with it; empty for a good one.
        size: [N] int64, bytes.
        sha256: [N, 32] uint8, of the file; zeros: not looked at, or faulty.
        phash: [N, 32] uint8, perceptual hash.
        width: [N] int32, pixels.
        height: [N] int32, pixels.
        round: [N] int32, the round that it came with, from 1; 0: none.
    """

    uris: list[str]
    etags: list[str]
    faults: list[str]
    size: np.ndarray
    sha256: np.ndarray
    phash: np.ndarray
    width: np.ndarray
    height: np.ndarray
    round: np.ndarray

    @classmethod
    def of(cls, uris: Sequence[str] = (), etags: Sequence[str] = (), sizes: Sequence[int] = ()) -> ImageTable:
        """Images that nothing is known of yet."""
        n = len(uris)
        hashes = (np.zeros((n, BYTES), np.uint8) for _ in range(2))
        numbers = (np.zeros(n, np.int32) for _ in range(3))
        return cls(list(uris), list(etags), [""] * n, np.array(sizes, np.int64), *hashes, *numbers)

    @classmethod
    def join(cls, tables: Sequence[ImageTable]) -> ImageTable:
        """The rows of all tables, one table after the other."""
        columns: list[list[Any]] = [[getattr(table, f.name) for table in tables] for f in fields(cls)]
        joined: list[Any] = [
            [x for part in c for x in part] if isinstance(c[0], list) else np.concatenate(c) for c in columns
        ]
        return cls(*joined)

    def __len__(self) -> int:
        return len(self.uris)

    def take(self, rows: Sequence[int] | np.ndarray) -> ImageTable:
        """A copy of the given rows."""
        index = np.asarray(rows, np.int64)
        columns: list[Any] = [getattr(self, f.name) for f in fields(self)]
        taken: list[Any] = [[c[i] for i in index.tolist()] if isinstance(c, list) else c[index] for c in columns]
        return ImageTable(*taken)

    def by_uri(self) -> ImageTable:
        """The rows sorted by URI."""
        return self.take(sorted(range(len(self)), key=self.uris.__getitem__))

    def put(self, rows: Sequence[int] | np.ndarray, other: ImageTable) -> None:
        """Overwrite the given rows by the rows of another table."""
        index = np.asarray(rows, np.int64)
        for field in fields(self):
            column, new = getattr(self, field.name), getattr(other, field.name)
            if isinstance(column, list):
                for i, value in zip(index.tolist(), new, strict=True):
                    column[i] = value
            else:
                column[index] = new

    def good(self) -> np.ndarray:
        """[N] bool: which images were looked at and are whole."""
        return np.asarray(self.sha256.any(1))

    def faulty(self) -> np.ndarray:
        """[N] bool: which images can't be read."""
        return np.array([bool(fault) for fault in self.faults], bool)

    def keys(self) -> np.ndarray:
        """[N] the sha256 as values that can be compared, sorted and looked up."""
        return np.ascontiguousarray(self.sha256).view(f"S{BYTES}")[:, 0]

    def to_bytes(self) -> bytes:
        """A compressed file; the same table gives the same bytes."""
        buffer = io.BytesIO()
        columns: dict[str, Any] = {f.name: self._packed(f.name) for f in fields(self)}
        np.savez_compressed(buffer, **columns)
        return buffer.getvalue()

    def save(self, uri: str) -> None:
        """Write it."""
        storage.write_bytes(uri, self.to_bytes())

    @classmethod
    def load(cls, uri: str) -> ImageTable:
        """Read what `save` wrote.

        Raises:
            UserError: it isn't there, or isn't whole.
        """
        return cls.from_bytes(storage.read_bytes(uri), uri)

    @classmethod
    def from_bytes(cls, content: bytes, uri: str) -> ImageTable:
        """What `to_bytes` made; `uri` is where it is from, for errors.

        Raises:
            UserError: it isn't whole.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                columns: list[Any] = [file[f.name] for f in fields(cls)]
            for n in range(3):  # the texts
                columns[n] = json.loads(columns[n].tobytes())
            count = len(columns[0])
            shapes = [(count, BYTES) if n in (4, 5) else (count,) for n in range(3, 9)]
            if [c.shape for c in columns[3:]] != shapes or {len(c) for c in columns[:3]} != {count}:
                raise ValueError("columns of different lengths")
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as e:
            raise UserError(f"{uri}: torn, or no table of ours ({' '.join(str(e).split())}); restore it") from None
        return cls(*columns)

    def _packed(self, name: str) -> np.ndarray:
        column = getattr(self, name)
        # escaped, as a key or file name may hold anything, even what is no Unicode
        return np.frombuffer(json.dumps(column).encode(), np.uint8) if isinstance(column, list) else column
