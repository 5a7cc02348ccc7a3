"""Where the networks run, and in which precision."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from softteacher.errors import UserError
from softteacher.processors import cpu_count


def find_device(name: str) -> torch.device:
    """The device that `training.device` names; `auto` is CUDA where there is one, a GPU of its own for each process.

    Raises:
        UserError: no such device here.
    """
    if name in {"auto", "cuda"} and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:  # the last: a device of a module that is not there
        why = str(e).splitlines()[0]
        raise UserError(f"training.device = {name!r}: not usable here ({why}); --set training.device=auto") from None
    return device


def find_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that the networks compute in; `auto`: bfloat16 where the hardware multiplies bf16 matrices."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def set_threads(threads: int = 0) -> None:
    """Let torch compute with so many threads on processors; 0: at most with one for each that this process may use.

    torch itself counts the machine's cores, however few of them the container has, and torchrun leaves a process one.
    """
    share = max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads or share < torch.get_num_threads() or "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(threads or share)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def keep_memory() -> None:
    """On a processor: keep freed memory for the next step, which would ask the system for the same amount.

    glibc hands blocks over 32 MB back at once, and every page of the next one is faulted in again. Other C libraries
    are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
