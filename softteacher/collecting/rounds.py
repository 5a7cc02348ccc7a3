"""The state of collecting: which images came with which round. It moves once a round, by a conditional write.

{state}/state.json           the rounds, and the name of the index
        index-{sha256}.npz   an `ImageTable` of every image that was ever looked at; never changed
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softteacher import storage
from softteacher.collecting.table import ImageTable
from softteacher.console import say
from softteacher.errors import Conflict, UserError

FORMAT = 1


@dataclass
class State:
    """What `state.json` says.

    Attributes:
        uri: of the folder or prefix.
        index: name of the index; none before the first commit.
        previous: name of the one before, which somebody may still be reading.
        pending: sha256 of the `pending.json` that the last commit put in.
        rounds: `round` (from 1), `run`, `accepted`, `time`, `images`, `labeled`, `labels`, `fingerprint` of each.
        etag: of `state.json`, for the conditional write; empty: there is none, or it lies on a local disk.
    """

    uri: str
    index: str | None = None
    previous: str | None = None
    pending: str | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    etag: str = ""

    @classmethod
    def read(cls, uri: str) -> State:
        """The state at a folder or prefix; an empty one where there is none yet.

        Raises:
            UserError: it can't be read, or isn't ours.
        """
        pointer = storage.join(uri, "state.json")
        try:
            if storage.is_s3(uri):
                data, etag = storage.read_unless(pointer, "")
            else:
                data, etag = storage.read_bytes(pointer), ""
        except storage.MissingFile:
            return cls(uri)
        try:
            tree = json.loads(data or b"")
            if tree["format"] != FORMAT or not all({"round", "accepted", "labels"} <= set(r) for r in tree["rounds"]):
                raise ValueError("another format")
            return cls(uri, tree["index"], tree["previous"], tree["pending"], tree["rounds"], etag)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{pointer}: torn, or not ours; restore it, or give another --state") from None

    def images(self) -> ImageTable:
        """Every image that was ever looked at, sorted by URI."""
        return ImageTable.load(storage.join(self.uri, self.index)) if self.index else ImageTable.of()

    def labels(self, accepted: bool) -> set[str]:
        """sha256 of the label files that accepted rounds brought, or rejected ones."""
        return {label["sha256"] for r in self.rounds if r["accepted"] == accepted for label in r["labels"]}


def write_pending(
    folder: Path, changes: ImageTable, *, after: str | None, number: int | None, record: dict[str, Any]
) -> None:
    """Write what `commit` needs.

    Args:
        folder: for `pending.json` and `pending.npz`.
        changes: rows of the index that are new or otherwise.
        after: `pending` of the state that they belong to.
        number: of the round; none: it is no round.
        record: what the state will say of the round: `images`, `labeled`, `labels`, `fingerprint`.
    """
    table = changes.to_bytes()
    storage.write_bytes(folder / "pending.npz", table)
    tree = {"after": after, "round": number, "record": record, "table_sha256": hashlib.sha256(table).hexdigest()}
    (folder / "pending.json").write_text(json.dumps(tree, indent=1))


def commit(state: str, pending: str, *, accepted: bool, run: str = "") -> dict[str, Any]:
    """Move the state on by what `collect` found; called again after it was cut off, it ends what it began.

    Args:
        state: folder or `s3://` prefix of the state.
        pending: folder or prefix that `collect` wrote.
        accepted: whether the round's model was taken; the images of a rejected round are not used again. Of a `collect`
            that found too few images only what they look like is kept; they are new again next time.
        run: id of the run, for the record.

    Returns:
        `round` and `accepted` (none if there was no round), `images` and `labeled` (new ones), and `index`.

    Raises:
        Conflict: another round was committed since `collect` read the state (on S3 also in the very same moment).
        UserError: either can't be read or written, or the files of `pending` don't belong together.
    """
    where = storage.join(pending, "pending.json")
    raw = storage.read_bytes(where)
    table = storage.join(pending, "pending.npz")
    content = storage.read_bytes(table)
    digest = hashlib.sha256(raw).hexdigest()
    try:
        tree = json.loads(raw)
        after, number, record = tree["after"], tree["round"], tree["record"]
        facts = {"round": number, "images": record["images"], "labeled": record["labeled"]}
        expected = tree["table_sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: torn, or not ours; run `softteacher collect` again") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{table}: not of the round of pending.json beside it; run `softteacher collect` again")
    changes = ImageTable.from_bytes(content, table)
    now = State.read(state)
    if now.pending != digest:
        if now.pending != after:
            raise Conflict(
                f"{state}: another round was committed since `collect` looked; run `softteacher collect` again"
            )
        rounds = now.rounds
        if number:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            rounds = [*rounds, {"round": number, "run": run, "accepted": accepted, "time": time, **record}]
        now = _move(now, _updated(now.images(), changes).to_bytes(), digest, rounds)
    verdict = bool(now.rounds[-1]["accepted"]) if number else None
    say(f"commit: {state} has {len(now.rounds)} rounds{', the last one rejected' if verdict is False else ''}")
    return {**facts, "accepted": verdict, "index": now.index}


def _updated(index: ImageTable, changes: ImageTable) -> ImageTable:
    """The index with the changed rows in place of its own, sorted by URI."""
    row_of = {uri: n for n, uri in enumerate(index.uris)}
    old = [n for n, uri in enumerate(changes.uris) if uri in row_of]
    index.put([row_of[changes.uris[n]] for n in old], changes.take(old))
    index = ImageTable.join([index, changes.take([n for n, uri in enumerate(changes.uris) if uri not in row_of])])
    return index.by_uri()


def _move(now: State, index: bytes, digest: str, rounds: list[dict[str, Any]]) -> State:
    """Write an index and make the state name it; returns the state as it is then."""
    name = f"index-{hashlib.sha256(index).hexdigest()}.npz"
    pointer = {"format": FORMAT, "index": name, "previous": now.index, "pending": digest, "rounds": rounds}
    storage.write_bytes(storage.join(now.uri, name), index)
    try:
        storage.write_bytes(
            storage.join(now.uri, "state.json"), json.dumps(pointer, indent=1).encode(), if_match=now.etag
        )
    except Conflict:
        winner = State.read(now.uri)
        if winner.pending == digest:  # the same round, by another try of the same step
            return winner
        if name not in (winner.index, winner.previous):
            storage.remove(storage.join(now.uri, name))
        raise Conflict(
            f"{now.uri}: another round was committed in this moment; run `softteacher collect` again"
        ) from None
    if now.previous and now.previous not in (name, now.index):
        storage.remove(storage.join(now.uri, now.previous))
    return State(now.uri, name, now.index, digest, rounds)
