"""Small tensors on their way to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of `host` on `device`; from pinned memory, so that it does not wait for what runs there."""
    return host.pin_memory().to(device, non_blocking=True) if str(device).startswith("cuda") else host.clone()
