"""`train` in one process, or in several of this machine through torchrun's launcher."""

from __future__ import annotations

import logging
import os
import uuid
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from softteacher.config import Settings
from softteacher.errors import UserError
from softteacher.training.interrupt import Stopped
from softteacher.training.train import train


def launch(
    labeled: str,
    unlabeled: str | None,
    validation: str,
    out: str,
    settings: Settings,
    checkpoints: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Train in this process, or in several; the other arguments are those of `softteacher.training.train.train`.

    Args:
        processes: on this machine; 0: one for each GPU, or one. Under torchrun this process is one of those that it
            started, whatever is given here.

    Raises:
        UserError: what the first process that failed says.
        Stopped: SIGTERM or SIGINT came.
    """
    arguments = (labeled, unlabeled, validation, out, settings, checkpoints)
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return train(*arguments)
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is said below, in one line
    # until it kills processes that were told to end: they save, to a store that may be slow; its own 30 s are few
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        return elastic_launch(config, _worker)(*arguments)[0]
    except SignalException as e:
        raise Stopped(128 + e.sigval) from None
    except ChildFailedError as e:
        first = e.get_first_failure()[1]
        if 128 < first.exitcode < 160:
            raise Stopped(first.exitcode) from None
        # `record` writes a dict; where it had no chance the launcher says what it saw
        said: Any = first.message
        text = str(said["message"] if isinstance(said, dict) else said)
        where = f"process {first.local_rank} of {processes}"
        if not text.startswith(_SAID):
            raise RuntimeError(f"{where}: {text}") from None
        raise UserError(f"{where}: {text.removeprefix(_SAID)}") from None


_SAID = f"{UserError.__name__}: "


@record
def _worker(*arguments: Any) -> dict[str, Any]:
    try:
        return train(*arguments)
    except UserError as e:  # subclasses too, under one name
        raise UserError(str(e)) from e
