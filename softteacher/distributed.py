"""One process of many, or the only one: torchrun's environment decides (RANK, WORLD_SIZE, LOCAL_RANK).

Every function is right in a single process too, without a process group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from softteacher.errors import UserError

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the process group that torchrun's environment describes; nothing happens in a single process.

    Args:
        device: of the networks: NCCL between GPUs, Gloo between processors.
        timeout: how long a process waits for the others, at rank 0's evaluation for example.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"process group: {str(e).splitlines()[0]}; start the processes with torchrun") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def normalizer(amount: Tensor | int, device: torch.device) -> Tensor:
    """What a sum over this process's part of the batch is divided by, so that the mean over all processes is the
    sum over the whole batch divided by the whole batch's amount (at least 1).

    Args:
        amount: this process's number of samples, or sum of weights.
        device: of the losses.
    """
    total = torch.as_tensor(amount, dtype=torch.float32, device=device).detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.clamp(min=1) / world_size()


def mean(values: list[float], device: torch.device) -> list[float]:
    """The mean over all processes of each of some numbers."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def gather(value: T) -> list[T]:
    """What each process gives, in order of rank, in every process. Values must pickle."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def once(work: Callable[[], T]) -> T:
    """What a function returns in the first process, in every process; the others don't run it."""
    if not dist.is_initialized():
        return work()
    values: list[Any] = [work() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]
