"""Retraining's first step: what has arrived since the last round becomes manifests as `split` writes them.

plan (what is there, what is new) -> hash_shard (looks at new images; any number at once) -> merge (the manifests)

`collect` is the three in one process. None of them moves the state; `commit` does, when the run has succeeded.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.collecting.hashes import look
from softteacher.collecting.merge import merge as merge
from softteacher.collecting.merge import refuse_base
from softteacher.collecting.rounds import State
from softteacher.collecting.rounds import commit as commit
from softteacher.collecting.sources import PARTS, find_labels, list_images, load_labels
from softteacher.collecting.table import ImageTable
from softteacher.console import Bar, say
from softteacher.data.coco import load_coco, require_same_classes
from softteacher.data.images import BadImage
from softteacher.errors import UserError
from softteacher.processors import cpu_count

THREADS = 16  # that read from a store, for most of their time is waiting
BLOCK = 4096  # images in flight


def collect(
    source: str,
    state: str,
    out: str,
    *,
    base: str,
    labels: Sequence[str] = (),
    min_new: int = 1,
    near_duplicate_bits: int = 10,
    max_bad_images: float = 0.1,
    include_rejected: bool = False,
) -> dict[str, Any]:
    """Find the images and labels that arrived since the last round.

    Args:
        source: folder or `s3://` prefix where unlabelled images arrive.
        state: folder or prefix of the state, which this reads only.
        out: folder or prefix for `labeled.json`, `unlabeled.json`, `validation.json` (new images have `"new": true`),
            `collect.json`, and what `commit` needs: `pending.json` and `pending.npz`.
        base: folder or prefix that `split` wrote.
        labels: COCO jsons, or folders or prefixes of them, with the base's classes. Their images lie at the json's own
            root or in `source`.
        min_new: a round is worthwhile from so many new images, counting those with new labels.
        near_duplicate_bits: pictures whose perceptual hashes (256 bits) differ in up to so many are the same; -1: only
            equal files are.
        max_bad_images: share of broken ones among the images that arrived that is survived (one always is).
        include_rejected: take the images and labels of rejected rounds, too, as new ones.

    Returns:
        What `collect.json` says; `enough` is whether the round is worthwhile.

    Raises:
        UserError: bad input, or too many broken images; nothing is written then.
    """
    refuse_base(out, base)  # before hours of looking
    with tempfile.TemporaryDirectory(prefix="softteacher-") as folder:
        plan(source, state, f"{folder}/plan", base=base, labels=labels, include_rejected=include_rejected)
        hash_shard(f"{folder}/plan", 0, f"{folder}/hashes")
        return merge(
            f"{folder}/plan",
            [f"{folder}/hashes"],
            out,
            min_new=min_new,
            near_duplicate_bits=near_duplicate_bits,
            max_bad_images=max_bad_images,
        )


def plan(
    source: str,
    state: str,
    out: str,
    *,
    base: str,
    labels: Sequence[str] = (),
    include_rejected: bool = False,
    shards: int = 1,
) -> dict[str, Any]:
    """List what is there and share out what has to be looked at.

    Args:
        source: as in `collect`.
        state: as in `collect`.
        out: folder or prefix for `plan.json`, three kinds of tables, and copies of the manifests and labels.
        base: as in `collect`.
        labels: as in `collect`.
        include_rejected: as in `collect`.
        shards: at most so many.

    Returns:
        `shards` (how many there are), `images` and `to_look_at`.

    Raises:
        UserError: bad input.
    """
    if shards < 1:
        raise UserError(f"--shards {shards}: must be 1 or more")
    if not storage.is_s3(source):
        source = str(Path(source).absolute())
        if not Path(source).is_dir():  # of a prefix nobody can say whether it is wrong, or nothing has arrived yet
            raise UserError(f"{source}: no such folder; check --source")
    source = source.rstrip("/")
    now = State.read(state)
    parts = [load_coco(storage.join(base, f"{part}.json"), labeled=part != "unlabeled") for part in PARTS]
    files = [load_labels(uri, source) for uri in find_labels(labels)]
    for file in files:
        require_same_classes(parts[0], file)
    images, ignored = list_images(source, [*parts, *files])
    known = now.images()
    row_of = {uri: n for n, uri in enumerate(known.uris)}
    # an image whose etag has changed keeps its old hashes until it is looked at: is it still the same picture?
    here = [n for n, uri in enumerate(images.uris) if uri in row_of]
    old = known.take([row_of[images.uris[n]] for n in here])
    same = np.array([images.etags[n] == tag for n, tag in zip(here, old.etags, strict=True)], bool)
    old.etags, old.size = [images.etags[n] for n in here], images.size[here]
    faults = [images.faults[n] for n in here]
    images.put(here, old)
    for n, fault, unchanged in zip(here, faults, same.tolist(), strict=True):
        images.faults[n] = fault or (images.faults[n] if unchanged else "")
    todo = np.setdiff1d(np.arange(len(images)), np.array(here, np.int64)[same & (old.good() | old.faulty())])
    shards = max(1, min(shards, len(todo)))
    there = set(images.uris)
    unseen = [n for n, uri in enumerate(known.uris) if uri not in there]
    # what an earlier round found in another source is believed to be there still
    elsewhere = [n for n in unseen if known.round[n] and not known.uris[n].startswith(source + "/")]
    gone = known.take(sorted(set(unseen) - set(elsewhere)))
    facts: dict[str, Any] = {"shards": shards, "images": len(images), "to_look_at": len(todo)}
    with storage.output_folder(out) as folder:
        ImageTable.join([images, known.take(elsewhere)]).by_uri().save(str(folder / "images.npz"))
        gone.save(str(folder / "gone.npz"))
        for n in range(shards):
            images.take(todo[n::shards]).save(str(folder / f"shard-{n}.npz"))
        for part in PARTS:  # copies, for a later step may not have a local folder, and all must see the same
            storage.copy(storage.join(base, f"{part}.json"), folder / f"{part}.json")
        told = []
        for n, file in enumerate(files):
            raw = storage.read_bytes(file.source)
            (folder / f"labels-{n}.json").write_bytes(raw)
            told.append({"uri": file.source, "root": file.root, "sha256": hashlib.sha256(raw).hexdigest()})
        tree = {
            "source": source,
            "base": base,
            "labels": told,
            # of a label file that both rejected and accepted rounds had, the labels are good
            "refused_labels": [] if include_rejected else sorted(now.labels(False) - now.labels(True)),
            "accepted_labels": sorted(now.labels(True)),
            "accepted": [False, *(r["accepted"] for r in now.rounds)],  # by number of the round
            "include_rejected": include_rejected,
            "after": now.pending,
            "ignored": ignored,
            **facts,
        }
        (folder / "plan.json").write_text(json.dumps(tree, indent=1))
    say(f"plan: {len(images)} images, {len(todo)} to look at, in {shards} shard{'s' * (shards > 1)}")
    return facts


def hash_shard(plan: str, shard: int, out: str) -> dict[str, Any]:
    """Look at the images of one shard.

    Args:
        plan: folder or prefix that `plan` wrote.
        shard: number of the shard, from 0.
        out: folder or prefix for `hashes.npz`.

    Returns:
        `shard`, `images`, `broken` and `vanished`.

    Raises:
        UserError: the store can't be read, or there is no such shard.
    """
    table = ImageTable.load(storage.join(plan, f"shard-{shard}.npz"))
    table.sha256[:] = table.phash[:] = 0
    todo = [n for n, fault in enumerate(table.faults) if not fault]
    vanished = 0

    def read(n: int) -> Any:
        try:
            return look(storage.read_bytes(table.uris[n]), table.uris[n])
        except (BadImage, storage.MissingFile) as e:
            return e

    threads = min(max(THREADS, cpu_count()), 1 + len(todo) // 8)  # a thread's first request takes its time
    with Bar("collect", len(todo)) as bar, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(todo), BLOCK):
            block = todo[start : start + BLOCK]
            futures = [pool.submit(read, n) for n in block]
            try:
                for n, future in zip(block, futures, strict=True):
                    seen = future.result()
                    if isinstance(seen, BadImage):
                        table.faults[n] = str(seen)
                    elif isinstance(seen, storage.MissingFile):
                        vanished += 1  # since it was listed; a row that is neither good nor faulty
                    else:
                        table.sha256[n] = np.frombuffer(seen.sha256, np.uint8)
                        table.phash[n] = np.frombuffer(seen.phash, np.uint8)
                        table.width[n], table.height[n] = seen.width, seen.height
                    bar.advance()
            finally:
                for future in futures:  # a store that can't be reached is not asked for every other image
                    future.cancel()
    with storage.output_folder(out) as folder:
        table.save(str(folder / "hashes.npz"))
    broken = sum(map(bool, table.faults))
    return {"shard": shard, "images": len(table), "broken": broken, "vanished": vanished}
