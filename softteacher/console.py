"""What the user sees while work goes on: progress bars in a terminal, progress lines in a log, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True, soft_wrap=True, highlight=False)

_SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """One line for the user, on standard error (standard output belongs to results)."""
    console.print(line, markup=False)


class Bar:
    """A progress bar: live in a terminal, a line every ten seconds where the output is a log.

    Example:
        >>> with Bar("train", 3) as bar:
        ...     for step in range(3):
        ...         bar.advance(f"loss {1 / (step + 1):.2f}")
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done, self._before = title, total, done, done
        self._live = None
        self._started = self._printed = time.monotonic()
        if console.is_terminal:
            columns = (TextColumn("{task.description:<10}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._live.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Move on by `steps`; `note` stands behind the bar."""
        self.done += steps
        if self._live:
            self._live.update(self._task, advance=steps, note=note)
            return
        now = time.monotonic()
        if console.quiet:
            return
        if now - self._printed >= _SECONDS_BETWEEN_LINES or (self.done == self.total and self.total > 1):
            self._printed = now
            filled = 24 * self.done // max(self.total, 1)
            left = (now - self._started) / max(self.done - self._before, 1) * (self.total - self.done)
            line = f"{self.title:<10} [{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total}"
            print(f"{line} {f'{left:.0f} s left ' if left else ''}{note}".rstrip(), file=sys.stderr, flush=True)


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Iterate with a `Bar`."""
    with Bar(title, total) as bar:
        for item in items:
            yield item
            bar.advance()
