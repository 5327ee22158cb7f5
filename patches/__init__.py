"""Every change to SGLang that registration or a subclass cannot make; patches/README.md explains each.

`LEDGER` is the whole list. Nothing of scope `sparsespec` touches a server that runs without the algorithm,
nothing of scope `cpu` a machine with a GPU, nothing of scope `offload` a server without host memory for KV, and nothing
of scope `lossy` a server whose output is the model's.
"""

from __future__ import annotations

from sglang_sparsespec.patches import (
    allocation,
    cpu_host,
    logits,
    lossy,
    memory,
    offload,
    requests,
    server_info,
)
from sglang_sparsespec.patches.ledger import SUPPORTED_SGLANG, Patch, apply, verify
from sglang_sparsespec.patches.memory import install as install_reserve
from sglang_sparsespec.patches.offload import install as install_offloader

LEDGER: tuple[Patch, ...] = (
    *cpu_host.PATCHES,
    *allocation.PATCHES,
    *memory.PATCHES,
    *requests.PATCHES,
    *logits.PATCHES,
    *server_info.PATCHES,
    *offload.PATCHES,
    *lossy.PATCHES,
)

__all__ = ["LEDGER", "SUPPORTED_SGLANG", "Patch", "apply", "install_offloader", "install_reserve", "verify"]
