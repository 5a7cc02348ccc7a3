"""Where the networks run, and in which precision."""

from __future__ import annotations

import torch

from softteacher.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that `training.device` names; `auto` is CUDA where there is one.

    Raises:
        UserError: no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"training.device = {name!r}: not usable here ({str(e).splitlines()[0]}); use auto") from None
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run the networks under bf16 autocast; `auto`: where the hardware multiplies bf16 matrices."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
