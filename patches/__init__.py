"""Every change to SGLang that registration or a subclass cannot make; patches/README.md explains each.

`LEDGER` is the whole list. Nothing of scope `sparsespec` touches a server that runs without the algorithm, and
nothing of scope `cpu` a machine with a GPU.
"""

from __future__ import annotations

from sglang_sparsespec.patches import allocation, cpu_host, requests
from sglang_sparsespec.patches.ledger import SUPPORTED_SGLANG, Patch, apply, verify

LEDGER: tuple[Patch, ...] = (*cpu_host.PATCHES, *allocation.PATCHES, *requests.PATCHES)

__all__ = ["LEDGER", "SUPPORTED_SGLANG", "Patch", "apply", "verify"]
