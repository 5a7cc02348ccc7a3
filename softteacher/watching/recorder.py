"""`TrafficRecorder`: beside a client, it counts what the detector answers and stores the counts now and then."""

from __future__ import annotations

import atexit
import os
import re
import socket
import threading
import uuid
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime

from softteacher import storage
from softteacher.console import say
from softteacher.detections import Detections
from softteacher.watching.profile import MIN_SCORE, TrafficProfile


class TrafficRecorder:
    """Counts answers and writes them to `{uri}/{yyyy}/{mm}/{dd}/{host}-{uuid}.json`, one file a version (UTC days).

    Writing is a thread's business. What can't be written is kept and added to the next file, so that a store that fails
    costs no request and no memory; it is told once. May be shared by threads; a forked process counts for itself, from
    nought. What is left is written by `close`, at the latest when the interpreter ends.

    Args:
        uri: folder or `s3://` prefix.
        name: of the model.
        every_images: write when so many have come,
        every_seconds: or when so much time has passed.
        min_score: of `TrafficProfile`; the reference's must be the same.

    Example:
        >>> with TrafficRecorder("s3://bucket/traffic", "cards") as recorder:          # doctest: +SKIP
        ...     recorder.add(found, image.size, version="3", classes=client.classes)
    """

    def __init__(
        self,
        uri: str,
        name: str,
        *,
        every_images: int = 1000,
        every_seconds: float = 300,
        min_score: float = MIN_SCORE,
    ) -> None:
        self.uri, self.name, self.min_score = uri, name, min_score
        self.every_images, self.every_seconds = every_images, every_seconds
        self._closed = self._failed = False
        self._start()
        _recorders.add(self)

    def _start(self) -> None:
        self._profiles: dict[tuple[str, tuple[str, ...]], TrafficProfile] = {}
        self._new = 0  # images since the last attempt to write
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def __enter__(self) -> TrafficRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, detections: Detections, size: tuple[int, int], version: str, classes: Sequence[str]) -> None:
        """Count the answer to one image. It never raises and never waits for the store.

        Args:
            detections: all that the detector found, in pixels of the image.
            size: (width, height) of the image.
            version: that answered.
            classes: its names, in label order.
        """
        try:
            with self._changed:
                if self._closed:
                    raise RuntimeError("it is closed")
                key = version, tuple(classes)
                if key not in self._profiles:
                    self._profiles[key] = TrafficProfile(key[1], self.name, version, self.min_score)
                self._profiles[key].observe(detections, size, datetime.now(UTC).isoformat(timespec="seconds"))
                self._new += 1
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="traffic recorder", daemon=True)
                    self._thread.start()
                    atexit.register(self.close)
                if self._new >= self.every_images:
                    self._changed.notify()
        except Exception as e:
            self._warn(f"an answer of {self.name} was not counted ({e})")

    def close(self, timeout: float = 10) -> None:
        """Write what is left.

        Args:
            timeout: seconds that it may take; what isn't written by then is lost, and that is told.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        atexit.unregister(self.close)
        if self._thread:
            self._thread.join(timeout)
        with self._changed:
            lost = sum(profile.images for profile in self._profiles.values())
        if lost or (self._thread and self._thread.is_alive()):
            say(f"{self.uri}: the traffic of the last {lost or 'few'} images could not be recorded")

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._new >= self.every_images, self.every_seconds)
                closed = self._closed
                profiles, self._profiles, self._new = self._profiles, {}, 0
            for key, profile in profiles.items():
                try:
                    self._write(profile)
                    self._failed = False
                except Exception as e:  # whatever it is, the thread must go on
                    self._warn(f"traffic can't be recorded at present, it is kept ({e})")
                    with self._changed:
                        later = self._profiles.get(key)
                        self._profiles[key] = profile + later if later else profile

    def _write(self, profile: TrafficProfile) -> None:
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
        day = datetime.now(UTC).strftime("%Y/%m/%d")
        profile.write(storage.join(self.uri, day, f"{host}-{uuid.uuid4().hex}.json"))

    def _warn(self, line: str) -> None:
        if not self._failed:
            self._failed = True
            say(f"{self.uri}: {line}")


_recorders: weakref.WeakSet[TrafficRecorder] = weakref.WeakSet()


def _after_fork() -> None:
    """What was counted is the parent's to write, and its thread, that a lock may wait for, isn't in the child."""
    for recorder in list(_recorders):
        recorder._start()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
