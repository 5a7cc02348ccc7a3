"""What has arrived and was looked at becomes the parts of a data set; `collect.py` has the steps before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from softteacher import storage
from softteacher.collecting.hashes import repeated
from softteacher.collecting.pool import Pool
from softteacher.collecting.rounds import write_pending
from softteacher.collecting.sources import PARTS
from softteacher.collecting.table import ImageTable
from softteacher.console import say
from softteacher.data.coco import CocoDataset, add_labeled, load_coco
from softteacher.data.records import ImageRecord, without_gc
from softteacher.errors import UserError


class Labels(NamedTuple):
    """What is taken of a label file.

    Attributes:
        dataset: the images and boxes.
        rows: [N] of its images in the pool.
        new: whether no accepted round had the file.
    """

    dataset: CocoDataset
    rows: np.ndarray
    new: bool


@without_gc()
def merge(
    plan: str,
    shards: Sequence[str],
    out: str,
    *,
    min_new: int = 1,
    near_duplicate_bits: int = 10,
    max_bad_images: float = 0.1,
) -> dict[str, Any]:
    """Make the manifests of a round out of a plan and what its shards saw.

    Args:
        plan: folder or prefix that `plan` wrote.
        shards: folders or prefixes that `hash_shard` wrote, in any order.
        out: as in `collect`.
        min_new: as in `collect`.
        near_duplicate_bits: as in `collect`.
        max_bad_images: as in `collect`.

    Returns:
        What `collect.json` says.

    Raises:
        UserError: bad input, a shard is missing, or too many images are broken; nothing is written then.
    """
    if min_new < 0:
        raise UserError(f"--min-new {min_new}: must be 0 or more")
    if not -1 <= near_duplicate_bits < 128:
        raise UserError(f"--near-duplicate-bits {near_duplicate_bits}: must be from -1 (off) to 127, e.g. 10")
    if not 0 <= max_bad_images <= 1:
        raise UserError(f"--max-bad-images {max_bad_images:g}: must be from 0 to 1, e.g. 0.1")
    tree = _read(plan)
    refuse_base(out, tree["base"])
    pool = Pool(plan, tree, shards, near_duplicate_bits)
    parts = {part: load_coco(storage.join(plan, f"{part}.json"), labeled=part != "unlabeled") for part in PARTS}
    base = {part: pool.rows(dataset) for part, dataset in parts.items()}
    arrived = np.setdiff1d(np.arange(len(pool.images)), np.concatenate(list(base.values())))
    pool.require_whole(arrived, max_bad_images)
    validation = pool.whole(base["validation"])
    if unseen := len(parts["validation"]) - len(validation):
        told = f"{tree['base']}: {unseen} of {len(parts['validation'])} validation images are missing or broken"
        pairs = zip(parts["validation"].images, base["validation"].tolist(), strict=True)
        first = next(image.file_name for image, row in pairs if row < 0 or not pool.images.sha256[row].any())
        if not len(validation):
            raise UserError(
                f"{told}; what arrives can't be compared with them, look at their root and file_name (first: {first})"
            )
        say(f"warning: {told}; what arrives can't be compared with those (first: {first})")
    labels = _labels(plan, pool, tree, validation)
    with_labels = pool.whole(*(file.rows for file in labels))

    # the base, where labels that arrived replace its own
    labeled = parts["labeled"].select(np.flatnonzero(~pool.same(base["labeled"], with_labels)))
    rest = parts["unlabeled"].select(np.flatnonzero(~pool.alike(base["unlabeled"], with_labels)))
    known = pool.whole(base["labeled"], base["unlabeled"])
    next_id = 1 + max(i.id for part in parts.values() for i in part.images)
    for file in labels:
        labeled = add_labeled(labeled, file.dataset, next_id)
        next_id += len(file.dataset)

    # what earlier rounds brought, if they were accepted
    earlier = arrived[pool.accepted[pool.round[arrived]] & pool.images.good()[arrived]]
    earlier = earlier[~(pool.same(earlier, known) | pool.alike(earlier, validation) | pool.alike(earlier, with_labels))]

    # and what is new, each kind of what is not taken off in turn
    new = arrived[pool.images.good()[arrived] & pool.in_source[arrived] & (pool.round[arrived] == 0)]
    new = pool.leave_out("in the validation set", new, pool.alike(new, validation))
    new = pool.leave_out("labelled", new, pool.alike(new, with_labels))
    known = ImageTable.join([known, pool.of_rounds()])
    twice = np.ones(len(new), bool)
    twice[np.unique(pool.images.take(new).keys(), return_index=True)[1]] = False
    new = pool.leave_out("duplicates", new, twice | pool.same(new, known))
    new = pool.leave_out("near-duplicates", new, pool.alike(new, known))
    new = pool.leave_out("near-duplicates", new, repeated(pool.images.phash[new], near_duplicate_bits))

    records = [*_records(pool.images.take(earlier), tree), *_records(pool.images.take(new), tree, new=True)]
    for n, image in enumerate(records):
        image.id = next_id + n
    parts |= {"labeled": labeled, "unlabeled": replace(rest, images=rest.images + records)}

    new_labeled = sum(len(file.dataset) for file in labels if file.new)
    enough = len(new) + new_labeled >= min_new
    reason = f"{len(new)} new images, {new_labeled} with new labels, {min_new} wanted"
    about: dict[str, Any] = {
        name: {"images": len(part), "fingerprint": part.fingerprint(), "boxes_per_class": part.class_counts()}
        for name, part in parts.items()
    }
    facts = {
        "enough": enough,
        "reason": reason,
        "round": len(tree["accepted"]),
        "new": len(new),
        "new_labeled": new_labeled,
        "of_earlier_rounds": len(earlier),
        "left_out": pool.left_out | {"files that are no images": {"files": tree["ignored"]}},
        "fingerprint": hashlib.sha256("".join(a["fingerprint"] for a in about.values()).encode()).hexdigest(),
        **about,
        "source": tree["source"],
        "base": tree["base"],
        "labels": [
            {"uri": label["uri"], "sha256": label["sha256"]}
            for label in tree["labels"]
            if label["sha256"] not in tree["refused_labels"]
        ],
    }
    if enough:
        pool.images.round[new] = facts["round"]
        for file in labels:
            first = file.rows[pool.in_source[file.rows] & (pool.round[file.rows] == 0)]
            pool.images.round[first] = facts["round"]
    number = facts["round"] if enough else None
    record = {
        "images": len(new),
        "labeled": new_labeled,
        "labels": [label for label in facts["labels"] if label["sha256"] not in tree["accepted_labels"]],
        "fingerprint": facts["fingerprint"],
    }
    with storage.output_folder(out) as folder:
        for name, part in parts.items():
            part.save(folder / f"{name}.json")
        (folder / "collect.json").write_text(json.dumps(facts, indent=1))
        write_pending(folder, pool.changes(), after=tree["after"], number=number, record=record)
    say(f"collect: {reason}{'' if enough else ': nothing to do'} -> {out}")
    return facts


def refuse_base(out: str, base: str) -> None:
    """Refuse to write a round over the split that all rounds begin with, where a rejected one would stay for good.

    Args:
        out: where the round is to be written.
        base: of the split.

    Raises:
        UserError: they are the same place.
    """
    if storage.place(out) == storage.place(base):
        raise UserError(f"--out {out}: is the --base, whose split would be overwritten; choose another folder")


def _read(plan: str) -> dict[str, Any]:
    where = storage.join(plan, "plan.json")
    try:
        tree = json.loads(storage.read_bytes(where))
        if "refused_labels" in tree:
            return tree
    except (ValueError, TypeError):
        pass
    raise UserError(f"{where}: torn, or not ours; make the plan again") from None


def _labels(plan: str, pool: Pool, tree: dict[str, Any], validation: ImageTable) -> list[Labels]:
    """What is taken of the label files: whole images that are not in the validation set, each of the last file."""
    found: list[Labels] = []
    later: set[bytes] = set()
    for number, label in reversed(list(enumerate(tree["labels"]))):
        if label["sha256"] in tree["refused_labels"]:
            say(f"{label['uri']}: was in a rejected round and is left out (see --include-rejected)")
            continue
        dataset = load_coco(storage.join(plan, f"labels-{number}.json"), label["root"])
        for n in np.flatnonzero(pool.rows(dataset) < 0).tolist():
            dataset.images[n].root = tree["source"]  # not where the others are
        rows = pool.rows(dataset)
        whole = rows >= 0
        whole[whole] = pool.images.good()[rows[whole]]
        if not whole.all():
            first = dataset.images[int(np.flatnonzero(~whole)[0])].file_name
            say(f"{label['uri']}: {(~whole).sum()} images are missing or broken and left out (first: {first})")
            pool.count("labels without a whole image", [dataset.uri(n) for n in np.flatnonzero(~whole).tolist()])
        leaks = pool.alike(rows, validation)
        if leaks.any():
            first = dataset.images[int(np.flatnonzero(leaks)[0])].file_name
            say(f"{label['uri']}: {leaks.sum()} images are in the validation set and left out (first: {first})")
            pool.count("labels of the validation set", [dataset.uri(n) for n in np.flatnonzero(leaks).tolist()])
        keys = pool.images.keys()
        chosen = [n for n in np.flatnonzero(whole & ~leaks).tolist() if keys[rows[n]] not in later]
        later |= {keys[row] for row in rows[chosen].tolist()}
        found.insert(0, Labels(dataset.select(chosen), rows[chosen], label["sha256"] not in tree["accepted_labels"]))
    return found


def _records(table: ImageTable, tree: dict[str, Any], new: bool = False) -> list[ImageRecord]:
    """Images as records without ids."""
    records, source = [], tree["source"] + "/"
    for uri, width, height in zip(table.uris, table.width.tolist(), table.height.tolist(), strict=True):
        inside = uri.startswith(source)
        root, _, name = (tree["source"], "", uri[len(source) :]) if inside else uri.rpartition("/")
        records.append(ImageRecord(0, name, width, height, root, new))
    return records
