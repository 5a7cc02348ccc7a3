"""One deployment of a name at a time: the claim file says who is at it, and that it is still alive."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from softteacher import storage
from softteacher.console import say
from softteacher.errors import UserError

RENEW = 10.0  # seconds between two signs of life
LEASE = 60.0  # seconds without one after which a deployment counts as dead


class Claim:
    """The right to change what is live under a name (on S3; a claim on a local disk is not written conditionally).

    A process that was killed leaves its claim. On the same host it is known to be dead, and its claim is taken over at
    once; that of another host when it has shown no sign of life for a minute of our own clock, since theirs may differ.
    """

    def __init__(self, uri: str, name: str) -> None:
        """Take it; where one is left that may be dead, wait for a sign of life.

        Args:
            uri: of the claim file.
            name: of the model, for messages.

        Raises:
            UserError: somebody else has it.
        """
        self.uri, self.name = uri, name
        self._mine: dict[str, Any] = {
            "owner": uuid4().hex,
            "host": socket.gethostname(),
            "time": time.time(),
            "beats": 0,
        }
        self._mine |= {"pid": os.getpid(), **_running(os.getpid())}
        etag = self._await_end()
        try:
            storage.write_bytes(uri, json.dumps(self._mine).encode(), if_match=etag)
        except storage.Conflict:
            raise UserError(f"{name}: somebody else has just begun to deploy it; wait for that run") from None

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Show signs of life, from a thread, while the block runs."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(RENEW):
                try:
                    etag = storage.etag(self.uri)
                    if not self.ours():
                        return
                    self._mine["beats"] += 1
                    storage.write_bytes(self.uri, json.dumps(self._mine).encode(), if_match=etag)
                except Exception as e:  # the store may be away for a while; `check` tells if that was too long
                    say(f"{self.name}: the claim could not be renewed, tried again: {e}")

        thread = threading.Thread(target=renew, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def check(self) -> None:
        """See that nobody took it over: called before anything becomes live.

        Raises:
            UserError: somebody did, since this run was too slow.
        """
        if not self.ours():
            raise UserError(f"{self.name}: another deployment took over, this one was too slow; look at the other")

    def release(self) -> None:
        """Give it back, if it is still ours."""
        if self.ours():
            storage.remove(self.uri)

    def ours(self) -> bool:
        """Whether nobody has taken it over."""
        theirs = read_claim(self.uri)
        return theirs is not None and theirs.get("owner") == self._mine["owner"]

    def _await_end(self) -> str:
        """Wait until nobody has it; returns the etag of what is to be replaced."""
        first, until = None, time.monotonic() + LEASE
        while True:
            etag = storage.etag(self.uri)
            theirs = read_claim(self.uri)
            if theirs is None:
                return ""  # it may have been given back since the etag was read
            if _dead(theirs) or (first == theirs and time.monotonic() > until):
                return etag
            here = self._mine.get("machine")
            if first not in (None, theirs) or (here and here == theirs.get("machine")):
                raise UserError(
                    f"{self.name}: {theirs['host']} has been deploying it for {seconds(theirs)} s;"
                    f" wait for that run, or remove {self.uri} if you know that it is dead"
                )
            if first is None:
                say(f"{self.name}: {theirs['host']} is deploying it, or was killed; waiting for a sign of life")
            first = theirs
            time.sleep(1)


def claim_uri(repository: str, name: str) -> str:
    """Where the claim on a model is."""
    return storage.join(repository, f"{name}-candidate", "claim.json")


def read_claim(uri: str) -> dict[str, Any] | None:
    """Who is deploying: `owner`, `host`, `time` (of the start, seconds since 1970), `beats`, `pid`; none if nobody is.

    Raises:
        UserError: the claim file is not ours.
    """
    try:
        claim = json.loads(storage.read_bytes(uri))
        return {"host": str(claim["host"]), "time": float(claim["time"]), **claim}
    except storage.MissingFile:
        return None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{uri}: torn, or not ours; remove it if nobody is deploying") from None


def seconds(claim: dict[str, Any]) -> int:
    """Since it was taken, as far as the clocks of two hosts can tell."""
    return max(0, round(time.time() - claim["time"]))


def _dead(claim: dict[str, Any]) -> bool:
    """Whether it is of a process of this machine that runs no more."""
    here = _running(os.getpid())
    # process numbers mean something only to the same boot of the same kernel, in the same container
    if not here or claim.get("machine") != here["machine"]:
        return False
    return _running(claim["pid"]).get("started") != claim["started"]


def _running(pid: int) -> dict[str, str]:
    """Where a process runs and when it started, in ticks of that boot; nothing if it is dead, or there is no /proc."""
    with suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state not in "ZX":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return {"machine": f"{boot} {Path('/proc/self/ns/pid').readlink()}", "started": rest[18]}
    return {}
