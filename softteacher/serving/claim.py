"""One deployment of a name at a time: the claim file says who is at it, and whether that process can still be alive."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from softteacher import storage
from softteacher.errors import UserError

CLAIM_TIMEOUT = 3600.0  # seconds after which a deployment on another host counts as dead


class Claim:
    """The right to change what is live under a name (on S3; a claim on a local disk is not written conditionally).

    A process that was killed leaves its claim. On the same host it is known to be dead, and its claim is taken over at
    once; that of another host after an hour.
    """

    def __init__(self, uri: str, name: str) -> None:
        """Take it.

        Args:
            uri: of the claim file.
            name: of the model, for messages.

        Raises:
            UserError: somebody else has it.
        """
        self.uri, self.name = uri, name
        mine = {"host": socket.gethostname(), "time": time.time(), "pid": os.getpid(), **_running(os.getpid())}
        self._text = json.dumps(mine).encode()
        etag = storage.etag(uri)
        theirs = read_claim(uri)
        if theirs and not _dead(theirs):
            raise UserError(
                f"{name}: {theirs['host']} has been deploying it for {time.time() - theirs['time']:.0f} s;"
                f" wait, or remove {uri} if that run is dead"
            )
        try:
            storage.write_bytes(uri, self._text, if_match=etag)
        except storage.Conflict:
            raise UserError(f"{name}: somebody else has just begun to deploy it; wait for that run") from None

    def check(self) -> None:
        """See that nobody took it over: called before anything becomes live.

        Raises:
            UserError: somebody did, since this run was too slow.
        """
        if not self._ours():
            raise UserError(f"{self.name}: another deployment took over, this one was too slow; look at the other")

    def release(self) -> None:
        """Give it back, if it is still ours."""
        if self._ours():
            storage.remove(self.uri)

    def _ours(self) -> bool:
        try:
            return storage.read_bytes(self.uri) == self._text
        except storage.MissingFile:
            return False


def claim_uri(repository: str, name: str) -> str:
    """Where the claim on a model is."""
    return storage.join(repository, f"{name}-candidate", "claim.json")


def read_claim(uri: str) -> dict[str, Any] | None:
    """Who is deploying: `host`, `time` (of the start, seconds since 1970), `pid`; none if nobody is.

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


def _dead(claim: dict[str, Any]) -> bool:
    if time.time() - claim["time"] > CLAIM_TIMEOUT:
        return True
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
