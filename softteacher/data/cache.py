"""A bounded cache of S3 images on the local disk, shared by all loader processes and trainings of a user."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import diskcache
from torch.utils.data import get_worker_info

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError

_SHARDS = 8
_TROUBLE = (OSError, sqlite3.Error, diskcache.Timeout)
_OPENING = threading.Lock()  # not a cache's own: a cache travels to loader processes


class ImageCache:
    """Reads images; those in S3 are kept on the local disk, the least recently used make room for new ones.

    An entry is used when the store says that the object still has its etag, which is asked once in a run (and
    process): a run sees new images under old names, and costs no traffic from its second epoch on. Local files are on
    the disk already. Without a disk that takes files, reading goes on without the cache. Threads may share one.

    Args:
        megabytes: its size on the disk, but never more than half of what is free there; 0: no cache.
        folder: on a local disk; none: `softteacher` in the user's cache folder, or else in the temporary folder.
    """

    def __init__(self, megabytes: int, folder: str | None = None) -> None:
        self.megabytes, self.folder = megabytes, folder
        self._cache: diskcache.FanoutCache | None = None
        self._opened, self._storing = False, True
        self._current: set[str] = set()  # URIs whose etags were compared in this run

    def read(self, uri: str) -> bytes:
        """The bytes of an image file.

        Raises:
            MissingFile: there is none.
            UserError: it can't be read, or the cache folder that the user named can't be used.
        """
        if not storage.is_s3(uri) or not self.megabytes:
            return storage.read_bytes(uri)
        kept, etag = self._load(uri)
        if kept is not None and uri in self._current:
            return kept
        data, etag = storage.read_unless(uri, etag)
        self._current.add(uri)
        if data is None:
            assert kept is not None
            return kept
        self._store(uri, data, etag)
        return data

    def _load(self, uri: str) -> tuple[bytes | None, str]:
        with _OPENING:
            if not self._opened:
                self._opened = True
                self._open()
        if (cache := self._cache) is not None:
            try:
                value, etag = cache.get(uri, tag=True) or (None, "")  # nothing at all: the lock was not to be had
                # the sum is ours: after a power cut, a file may be there whose bytes are not
                if value and zlib.crc32(value[4:]) == int.from_bytes(value[:4], "big"):
                    return value[4:], etag
            except _TROUBLE as e:
                self._cache = None
                self._say(e, "going on without it, every image comes from S3")
        return None, ""

    def _store(self, uri: str, data: bytes, etag: str) -> None:
        if (cache := self._cache) is not None and self._storing and etag:
            try:
                cache.set(uri, zlib.crc32(data).to_bytes(4, "big") + data, tag=etag)
            except _TROUBLE as e:
                self._storing = False
                self._say(e, "no further images are kept")

    def _open(self) -> None:
        try:
            folder = cache_folder(self.folder)
            # shards have locks of their own: many processes hardly wait for each other
            cache = diskcache.FanoutCache(
                folder, _SHARDS, timeout=1, disk=_Bytes, eviction_policy="least-recently-used", size_limit=2**62
            )
            limit = min(self.megabytes * 2**20, (shutil.disk_usage(folder).free + cache.volume()) // 2)
            cache.reset("size_limit", limit // _SHARDS)
            cache.cull()  # it may have been larger
            self._cache = cache
        except _TROUBLE as e:
            self._say(e, "going on without it, every image comes from S3")

    def _say(self, error: Exception, what: str) -> None:
        worker = get_worker_info()
        if worker is None or worker.id == 0:  # one line, not one from every process
            say(f"image cache: {' '.join(str(error).split())}; {what}")


def cache_folder(named: str | None = None) -> Path:
    """The folder of the cache, made if need be: the named one, or the first of the usual ones that we may write to.

    Raises:
        UserError: the named folder can't be used.
        OSError: no folder can.
    """
    user = os.getuid()
    usual = (os.environ.get("XDG_CACHE_HOME") or "~/.cache", f"{tempfile.gettempdir()}/softteacher-{user}")
    for folder in [Path(named)] if named else [Path(parent, "softteacher", "images") for parent in usual]:
        try:
            folder = folder.expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # in a folder of somebody else's, the images would be whatever they like
            if os.access(folder, os.W_OK | os.X_OK) and (named or folder.stat().st_uid == user):
                return folder
        except (OSError, RuntimeError):  # the latter: a user without a home
            pass
    if named:
        raise UserError(f"data.cache_dir={named}: no folder that can be written to; choose another, or data.cache_mb=0")
    raise OSError("no folder can be written to (set data.cache_dir)")


class _Bytes(diskcache.Disk):
    """Values are bytes. diskcache would unpickle others, that is, run what somebody put there."""

    def fetch(self, mode: int, filename: str, value: Any, read: bool) -> Any:
        return None if mode == diskcache.core.MODE_PICKLE else super().fetch(mode, filename, value, read)
