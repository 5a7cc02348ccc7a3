"""What a detector found in one shard of a data set, on the disk, and the shards put together again, bit for bit."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.data.check import report_broken
from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.observe import Observed
from softteacher.evaluation.shard import Shard
from softteacher.model_folder import ModelFolder

BY_BOX = ("boxes", "scores", "labels", "masks", "variance")  # the others have one row for each image


def save_found(
    folder: Path, name: str, found: dict[int, Detections], shard: Shard, source: ModelFolder, dataset: CocoDataset
) -> None:
    """Write the detections of a shard as `name.npz` and `name.json`.

    Args:
        folder: where to.
        name: of the detector.
        found: by image id, numpy.
        shard: which.
        source: the model.
        dataset: all of it.
    """
    arrays = {"ids": np.array(list(found), np.int64), "counts": np.array([len(d) for d in found.values()], np.int64)}
    for key in vars(next(iter(found.values()))) if found else ():
        values = [getattr(d, key) for d in found.values()]
        if values[0] is not None:
            arrays[key] = np.concatenate(values) if key in BY_BOX else np.stack(values)
    with (folder / f"{name}.npz").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    (folder / f"{name}.json").write_text(json.dumps(_about(source, dataset) | {"shard": shard}))


def load_found(parts: Sequence[str], name: str, source: ModelFolder, dataset: CocoDataset) -> dict[int, Detections]:
    """The detections of all shards, by image id.

    Args:
        parts: folders or prefixes, one for each shard, in any order.
        name: as it was saved.
        source: the model.
        dataset: all of it.

    Raises:
        UserError: a shard is missing, there twice, or of something else; or too many images are broken.
    """
    found: dict[int, Detections] = {}
    shards = []
    for part in parts:
        where = storage.join(part, f"{name}.json")
        try:
            about = json.loads(storage.read_bytes(where))
            shards.append(Shard(*about.pop("shard")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: torn, or not ours; run this shard again") from None
        if about != _about(source, dataset):
            raise UserError(f"{part}: is of another model, data set or --set; give the shards of {source.name}")
        found |= _read(storage.join(part, f"{name}.npz"))
    if sorted(shards) != [Shard(n + 1, len(shards)) for n in range(len(shards))]:
        given = ", ".join(f"{number}/{of}" for number, of in sorted(shards))
        raise UserError(f"shards {given}: each is needed once; run the missing ones")
    broken = [n for n, image in enumerate(dataset.images) if image.id not in found]
    told = [f"{dataset.uri(n)}: could not be read by its shard, whose log says why" for n in broken]
    report_broken(dataset, told, source.settings.data.max_bad_images)
    return found


def _about(source: ModelFolder, dataset: CocoDataset) -> dict[str, Any]:
    tree = source.settings.model_dump(mode="json")
    # a shard is every n-th batch
    how = {"detector": tree["detector"], **{key: tree["training"][key] for key in ("evaluate_batch", "precision")}}
    return {"model": source.provenance["sha256"], "data": dataset.fingerprint(), **how}


def _read(uri: str) -> dict[int, Detections]:
    try:
        with storage.local_input(uri) as path, np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        ids, counts = arrays.pop("ids"), arrays.pop("counts")
        ends = np.cumsum(counts)
        found: dict[int, Detections] = {}
        for n, (image, end, count) in enumerate(zip(ids.tolist(), ends.tolist(), counts.tolist(), strict=True)):
            rows = slice(end - count, end)
            values = {key: array[rows] if key in BY_BOX else array[n] for key, array in arrays.items()}
            found[image] = Observed(**values) if "variance" in values else Detections(**values)
    except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{uri}: torn, or not ours; run this shard again") from None
    return found
