"""All images that a round may be made of, and what may be asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.collecting.hashes import near
from softteacher.collecting.sources import place
from softteacher.collecting.table import ImageTable
from softteacher.console import say
from softteacher.data.coco import CocoDataset
from softteacher.errors import UserError

SHOWN = 5  # examples of each kind, in messages and facts


class Pool:
    """The images of a plan, with what its shards saw.

    Attributes:
        images: those that are there, sorted by URI; `round` is what the next state will say.
        gone: those that the state knows and that are not there: what has a round was in the source.
        looked: [N] bool, which of `images` the shards looked at.
        in_source: [N] bool, which of `images` lie in the source.
        accepted: [rounds + 1] bool, by number of the round.
        round: [N] int32, the round of each image as this run takes it: 0 for a rejected one that is to be new again.
        left_out: how many images of each kind were left out, and the first of them.
    """

    def __init__(self, plan: str, tree: dict[str, Any], shards: Sequence[str], bits: int) -> None:
        """Read them.

        Args:
            plan: folder or prefix of the plan.
            tree: its `plan.json`.
            shards: what `hash_shard` wrote.
            bits: as `near_duplicate_bits` of `collect`.

        Raises:
            UserError: something can't be read, or a shard is missing or of another plan.
        """
        self.bits = bits
        self.left_out: dict[str, dict[str, Any]] = {}
        self.images = ImageTable.load(storage.join(plan, "images.npz"))
        self.gone = ImageTable.load(storage.join(plan, "gone.npz"))
        self._row_of = {uri: n for n, uri in enumerate(self.images.uris)}
        seen = ImageTable.join([ImageTable.of(), *(ImageTable.load(storage.join(s, "hashes.npz")) for s in shards)])
        rows = np.array([self._row_of.get(uri, -1) for uri in seen.uris], np.int64)
        if len(np.unique(rows)) != tree["to_look_at"] or len(rows) != tree["to_look_at"] or (rows < 0).any():
            raise UserError(
                f"{plan}: needs each of its {tree['shards']} shards once, and of no other plan; hash the missing ones"
            )
        # a file that was compressed again under its old name is the picture of its old round
        before = self.images.take(rows)
        differing = np.unpackbits(seen.phash ^ before.phash, axis=1).sum(1)
        same = (seen.keys() == before.keys()) | (differing <= bits)
        seen.round[~(same & seen.good() & before.good())] = 0
        self.images.put(rows, seen)
        # half of a file may be there while it is uploaded again: whole again it is of its old round
        self._broken_now = rows[seen.faulty() & before.good() & (before.round > 0)]
        self.looked = np.zeros(len(self.images), bool)
        self.looked[rows] = True
        self._before = self.images.round.copy()
        source = tree["source"] + "/"
        self.in_source = np.array([uri.startswith(source) for uri in self.images.uris], bool)
        self.accepted = np.array(tree["accepted"])
        self._follow_renames()
        self.round = self.images.round.copy()
        if tree["include_rejected"]:
            self.round[~self.accepted[self.round]] = 0
            self.gone.round[~self.accepted[self.gone.round]] = 0

    def rows(self, dataset: CocoDataset) -> np.ndarray:
        """[N] int64, the row of each image of a data set in `images`; -1: not there."""
        uris = (place(i.root or dataset.root, i.file_name) for i in dataset.images)
        return np.array([self._row_of.get(uri, -1) for uri in uris], np.int64)

    def whole(self, *rows: np.ndarray) -> ImageTable:
        """The images at the given rows, without broken ones and those that are not there."""
        table = self.images.take(np.concatenate([np.zeros(0, np.int64), *(r[r >= 0] for r in rows)]))
        return table.take(np.flatnonzero(table.good()))

    def same(self, rows: np.ndarray, table: ImageTable) -> np.ndarray:
        """[N] bool: which rows are files that the table has, too."""
        at = rows.clip(0)
        return (rows >= 0) & self.images.good()[at] & np.isin(self.images.keys()[at], table.keys())

    def alike(self, rows: np.ndarray, table: ImageTable) -> np.ndarray:
        """[N] bool: which rows are pictures that the table has, too."""
        answer = self.same(rows, table)
        ask = np.flatnonzero(~answer & (rows >= 0) & self.images.good()[rows.clip(0)])
        answer[ask] = near(self.images.phash[rows[ask]], table.phash, self.bits)
        return answer

    def of_rounds(self) -> ImageTable:
        """Images of all rounds, but not accepted ones that have gone since: they may come back, in whatever form."""
        there = np.flatnonzero((self.round > 0) & self.images.good())
        gone = np.flatnonzero((self.gone.round > 0) & ~self.accepted[self.gone.round])
        return ImageTable.join([self.images.take(there), self.gone.take(gone)])

    def count(self, kind: str, names: Sequence[str]) -> None:
        """Note images that are left out."""
        entry = self.left_out.setdefault(kind, {"images": 0, "first": []})
        entry["images"] += len(names)
        entry["first"] += names[: SHOWN - len(entry["first"])]

    def leave_out(self, kind: str, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Note those of the rows that `out` [N] says; returns the others."""
        self.count(kind, [self.images.uris[n] for n in rows[out].tolist()])
        return rows[~out]

    def require_whole(self, rows: np.ndarray, max_bad: float) -> None:
        """Count and name the broken ones among the rows.

        Raises:
            UserError: they are more than the share `max_bad` of those looked at now, and more than one.
        """
        broken = rows[self.images.faulty()[rows]]
        now = broken[self.looked[broken]]
        total = len(now) + int((self.looked[rows] & self.images.good()[rows]).sum())
        self.count("broken", [self.images.uris[n] for n in broken.tolist()])
        if len(now) > max(1, int(max_bad * total)):
            raise UserError(
                f"{len(now)} of {total} images that arrived are broken, {max(1, int(max_bad * total))} allowed; first: "
                f"{self.images.faults[now[0]]} (remove them, or allow more: --max-bad-images)"
            )
        for n in now[:SHOWN].tolist():
            say(self.images.faults[n])
        if len(now):
            say(f"collect: {len(now)} of {total} images that arrived are broken and left out")

    def changes(self) -> ImageTable:
        """The rows that the state doesn't have yet, or otherwise; of broken ones of a round it keeps what it has."""
        known = self.images.good() | self.images.faulty()
        changed = np.flatnonzero((self.looked & known) | (self.images.round != self._before))
        return ImageTable.join([self.images.take(np.setdiff1d(changed, self._broken_now)), self._renamed])

    def _follow_renames(self) -> None:
        """A file that has gone from the source and is there under another name takes its round with it."""
        moved = np.flatnonzero(self.gone.round)
        gone = dict(zip(self.gone.keys()[moved].tolist(), moved.tolist(), strict=True))
        unknown = np.flatnonzero(self.in_source & self.images.good() & (self.images.round == 0))
        left = []
        for row, key in zip(unknown.tolist(), self.images.keys()[unknown].tolist(), strict=True):
            if (old := gone.pop(key, None)) is not None:
                self.images.round[row] = self.gone.round[old]
                left.append(old)
        self.gone.round[left] = 0
        self._renamed = self.gone.take(left)
