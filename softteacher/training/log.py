"""What training says of itself: lines of JSON, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from softteacher import distributed


class TrainingLog:
    """`training.jsonl` and TensorBoard events.

    Args:
        folder: gets both, with the first line; none: nothing is written.
        lines: those that a resumed run has already; new ones are added to this list.
    """

    def __init__(self, folder: Path | None, lines: list[str]) -> None:
        self.folder, self.lines = folder, lines
        self.board: SummaryWriter | None = None
        self.file: TextIO | None = None
        for line in self.lines:
            self._show(line)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board and self.file:
            self.board.close()
            self.file.close()

    def write(self, numbers: dict[str, float]) -> None:
        """Add a line; `step` is one of the numbers."""
        self.lines.append(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in numbers.items()}))
        self._show(self.lines[-1])

    def _show(self, line: str) -> None:
        if self.folder and not self.board:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in log_files(self.folder):
                old.unlink()
            self.board, self.file = SummaryWriter(self.folder), (self.folder / "training.jsonl").open("w")
        if self.board and self.file:
            self.file.write(line + "\n")
            self.file.flush()
            numbers = json.loads(line)
            step = numbers.pop("step")
            for key, value in numbers.items():
                self.board.add_scalar(key, value, step)


def log_files(folder: Path) -> list[Path]:
    """What a `TrainingLog` has written into a folder."""
    return [*folder.glob("training.jsonl"), *folder.glob("events.out.tfevents.*")]


def window_means(window: dict[str, list[Tensor | float]], device: torch.device) -> dict[str, float]:
    """The mean of each number's finite values, over the steps of a window and all processes; without any, no number."""
    sums: list[float] = []
    counts: list[float] = []
    for values in window.values():
        known = [v for v in values if not isinstance(v, Tensor)]
        fresh = [v for v in values if isinstance(v, Tensor)]  # on a GPU: fetched in one go
        known += torch.stack(fresh).tolist() if fresh else []
        finite = [v for v in known if math.isfinite(v)]
        sums.append(sum(finite))
        counts.append(len(finite))
    # not the mean of the processes' means: one that knows less counts less
    totals = distributed.mean(sums + counts, device)
    known_of_all = zip(window, totals[: len(window)], totals[len(window) :], strict=True)
    return {key: total / count for key, total, count in known_of_all if count}
