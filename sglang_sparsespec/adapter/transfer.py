"""Small tensors on their way to the device and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sglang_sparsespec.kv.offload import pinned_copy


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy of `host` on `device`; from pinned memory, so that it does not wait for what runs there."""
    return host.pin_memory().to(device, non_blocking=True) if str(device).startswith("cuda") else host.clone()


class ToHost(NamedTuple):
    """A copy that nobody waits for."""

    host: torch.Tensor
    arrived: Any
    """CUDA event; None: it is there."""

    @property
    def is_there(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())

    def read(self) -> list[int]:
        """Waits if need be; at once where something that was enqueued later has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def to_host(tensor: torch.Tensor) -> ToHost:
    """A copy of a tensor of integers, in stream order, into pinned memory."""
    host = pinned_copy(tensor)
    if not tensor.is_cuda:
        return ToHost(host, None)
    event = torch.cuda.Event()
    event.record()
    return ToHost(host, event)
