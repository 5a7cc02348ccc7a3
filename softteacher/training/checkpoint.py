"""Checkpoints of a run: a folder or S3 prefix of files that say by their names whether they are whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


def difference(run: dict[str, Any], other: dict[str, Any]) -> str:
    """How the identity of another run differs from that of this one, three items at most; empty where it does not."""
    odd = [k for k in {**run, **other} if run.get(k) != other.get(k)]
    said = [f"{k} is {run.get(k)!r:.80}, there it was {other.get(k)!r:.80}" for k in odd[:3]]
    return "; ".join([*said, f"and {len(odd) - 3} more"] if len(odd) > 3 else said)


class Checkpoints:
    """The last few checkpoints of one run.

    A file is named `step-<steps done>-<start of its sha256>.pt` and written whole or not at all. To S3 it is sent while
    training goes on.

    Args:
        uri: folder or `s3://` prefix.
        run: what makes a run this run: settings and data. JSON-able, flat.
        keep: how many stay.

    Example:
        >>> checkpoints = Checkpoints("model/checkpoints", {"training.seed": 0}, keep=2)   # doctest: +SKIP
        >>> state = checkpoints.load()                                                     # doctest: +SKIP
    """

    def __init__(self, uri: str, run: dict[str, Any], keep: int) -> None:
        self.uri, self.run, self.keep = uri, run, keep
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], wait: bool = False) -> None:
        """Write a checkpoint and remove those that are one too many.

        Args:
            step: optimizer steps done.
            state: tensors, numbers, texts, and lists and dicts of them.
            wait: until it is there; raise if it can't be written. Otherwise a failure is said, and training goes on.

        Raises:
            UserError: it can't be written (`wait` only).
        """
        self.finish()
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "run": self.run, "step": step, **state}, buffer)
        data = buffer.getbuffer()
        uri = storage.join(self.uri, f"step-{step:09d}-{hashlib.sha256(data).hexdigest()[:16]}.pt")
        self._sending = self._sender.submit(self._write, uri, data)
        if wait or not storage.is_s3(uri):
            self.finish(wait)

    def finish(self, strict: bool = False) -> None:
        """Wait for the checkpoint that is on its way.

        Raises:
            UserError: it could not be written (`strict` only; said otherwise).
        """
        sending, self._sending = self._sending, None
        try:
            if sending:
                sending.result()
        except UserError as e:
            if strict:
                raise
            say(f"warning: no checkpoint: {e}; training goes on, and would resume from the one before")

    def load(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole, or none.

        Raises:
            UserError: it belongs to a run with other settings or data.
        """
        for name in self._names():
            uri = storage.join(self.uri, name)
            try:
                data = storage.read_bytes(uri)
                if hashlib.sha256(data).hexdigest()[:16] != _NAME.fullmatch(name)[2]:  # type: ignore[index]
                    raise ValueError("it is torn: its sha256 is not that of its name")
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state["run"], dict):
                    raise ValueError("it is none of ours")
            except storage.MissingFile:
                continue
            except UserError:
                raise
            except Exception as e:  # bytes that aren't ours can make the unpickler raise anything
                say(f"{uri}: not used, {str(e).splitlines()[0][:200]}; the one before it is looked at")
                continue
            if odd := difference(self.run, state["run"]):
                raise UserError(
                    f"{self.uri}: holds checkpoints of another run ({odd}); give the same settings and data to resume "
                    "it, choose another --out or --checkpoints, or delete them"
                )
            return state
        return None

    def remove(self) -> None:
        """Remove them all; the folder too if nothing else is in it."""
        self.finish()
        for name in self._names():
            storage.remove(storage.join(self.uri, name))
        if not storage.is_s3(self.uri):
            with contextlib.suppress(OSError):
                Path(self.uri).rmdir()

    def _names(self) -> list[str]:
        """The files, newest first."""
        return sorted((f.name for f in storage.list_files(self.uri) if _NAME.fullmatch(f.name)), reverse=True)

    def _write(self, uri: str, data: memoryview) -> None:
        storage.write_bytes(uri, data)
        # besides this one, which may be of an earlier step than a torn one that the run could not go on from
        for name in [n for n in self._names() if n != uri.rsplit("/", 1)[-1]][self.keep - 1 :]:
            storage.remove(storage.join(self.uri, name))
