"""What makes a run this run: it goes on with nothing else, and is not trained again."""

from __future__ import annotations

import json
from typing import Any

from softteacher import distributed, storage
from softteacher.config import Settings
from softteacher.data.coco import CocoDataset
from softteacher.errors import UserError
from softteacher.storage import join
from softteacher.training.checkpoint import difference

# a run may go on with others of these: they decide where and how fast it runs; the batch counts as a whole
_INDIFFERENT = {
    "data.workers",
    "data.max_bad_images",
    *(f"training.{key}" for key in ("device", "threads", "log_every", "evaluate_batch", "keep_checkpoints")),
    *(f"training.{key}" for key in ("checkpoint_every", "labeled_per_batch", "unlabeled_per_batch", "accumulate")),
    "training.separate_backward",
    "training.reference_batch",  # what follows from it does matter
    "method.burn_in_cache",
}


def batch_of(settings: Settings) -> str:
    """The images of a step, all processes together."""
    s = settings.training
    times = distributed.world_size() * s.accumulate
    return f"{times * s.labeled_per_batch} + {times * s.unlabeled_per_batch} images"


def flat(settings: Settings) -> dict[str, Any]:
    """The settings as `group.key: value`, of JSON's types."""
    tree = settings.model_dump(mode="json")
    return {f"{group}.{key}": value for group, values in tree.items() for key, value in values.items()}


def identity(settings: Settings, sets: dict[str, CocoDataset]) -> dict[str, Any]:
    """What makes a run this run: the settings that decide its result, the batch of all processes, and the data."""
    kept = {
        k: v
        for k, v in flat(settings).items()
        if k not in _INDIFFERENT and not k.startswith(("export.", "data.cache_"))
    }
    prints = {
        f"data set {name}": d.fingerprint(masks=settings.detector.masks and name != "unlabeled")
        for name, d in sets.items()
    }
    return {**kept, "batch": batch_of(settings), **prints}


def burn_in_of(run: dict[str, Any]) -> dict[str, Any]:
    """What makes the burn-in of a run this burn-in: not the method, but its moving average, nor unlabelled images."""
    shared = ("method.burn_in", "method.ema_momentum", "method.ema_ramp")
    kept = {k: v for k, v in run.items() if (not k.startswith("method.") or k in shared) and k != "data set unlabeled"}
    return kept | {"batch": run["batch"].split(" + ")[0]}


def finished(out: str, run: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of the model at `out`, if there is a whole one.

    Raises:
        UserError: it is of another run, whose work would be lost.
    """
    try:
        other = dict(json.loads(storage.read_bytes(join(out, "provenance.json")))["run"])
        metrics = json.loads(storage.read_bytes(join(out, "metrics.json")))
    except (storage.MissingFile, ValueError, KeyError, TypeError):
        return None
    if odd := difference(run, other):
        raise UserError(
            f"{out}: holds the model of another run ({odd}); choose another folder for this one, or remove it"
        )
    return metrics
