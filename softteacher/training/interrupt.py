"""SIGTERM (a spot node is taken away, a pod is deleted) and Ctrl-C end a run at the next good moment, not in a step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from softteacher.console import say

_ONE_REQUEST = 2.0  # seconds


class Stopped(SystemExit):
    """The process was told to end, and its work is saved. Its code is 128 + the signal's number, as a shell has it."""


class StopRequest:
    """Whether the process was told to end.

    Attributes:
        signal: number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False
        self._since = 0.0

    @contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Signals are noted instead of ending the process; a second one ends it. Outside the main thread: nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block, where nothing is half done, a signal raises `Stopped`."""
        self._at_once = True
        try:
            if self.signal:
                self.stop()
            yield
        finally:
            self._at_once = False

    def stop(self) -> None:
        """Raise `Stopped`."""
        raise Stopped(128 + self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, number
        # a terminal's Ctrl-C reaches launcher and processes, and the launcher hands it on: that is one request
        insists = not first and time.monotonic() - self._since > _ONE_REQUEST
        if insists or self._at_once:
            self.stop()
        if not first:
            return
        self._since = time.monotonic()
        say(f"{signal.Signals(number).name}: this step ends, then a checkpoint is written")
