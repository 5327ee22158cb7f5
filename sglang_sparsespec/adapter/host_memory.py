"""How much host memory KV may take: what the machine, or the container that this runs in, can spare.

Pinned memory cannot be swapped out and comes back only when the server ends, so a server never takes all that is free.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

from sglang_sparsespec.errors import ConfigError

AUTO = "auto"
AUTO_SHARE = 0.5
"""Of the free memory, for `auto`: the rest is for weights on their way to the device, the file cache and others."""
AUTO_POOLS = 2
"""No more than this many device pools, for `auto`: a demand of three pools fits, and pinning takes time at start."""
MAX_SHARE = 0.8
"""Of all memory, for a number that the user names."""
CGROUP = Path("/sys/fs/cgroup")


class HostMemory(NamedTuple):
    """Bytes of the machine, or of the container where that has less."""

    total: int
    free: int


def host_memory(cgroup: Path = CGROUP) -> HostMemory:
    """What there is, and what is free or can be freed."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    # version 2; then version 1
    for limit_file, used_file, stat_file in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit = _number(cgroup / limit_file)
        if limit is None or limit >= total:
            continue
        used = _number(cgroup / used_file) or 0
        # cached files count as used and go when memory is needed
        used -= min(used, _inactive_file(cgroup / stat_file))
        total, free = limit, min(free, max(0, limit - used))
    return HostMemory(total, free)


def parse_host_memory_gb(text: str) -> float | str:
    """The option as it stands on the command line; what is not a number is judged with the other options."""
    try:
        return float(text)
    except ValueError:
        return text


def default_host_memory_gb(device: str, *, is_verify_sparse: bool) -> float | str:
    """What the option is where it is left out.

    On a CPU it would copy memory to the same memory, and with sparse verification it is not tested.
    """
    return AUTO if device == "cuda" and not is_verify_sparse else 0.0


def resolve_host_memory_gb(value: float | str, memory: HostMemory) -> float:
    """The option as a number, 10^9 bytes for the whole server; the config checks it further.

    Raises:
        ConfigError: for a word other than `auto`, and for more than a safe share of the machine.
    """
    if value == AUTO:
        return AUTO_SHARE * memory.free / 1e9
    if isinstance(value, str):
        raise ConfigError(
            "--sparsespec-host-memory-gb",
            value,
            f"{AUTO} or a number of at least 0",
            "It is the host memory for KV in 10^9 bytes, a total for the server; 0 turns offloading off.",
        )
    largest = MAX_SHARE * memory.total / 1e9
    if largest < value < float("inf"):
        raise ConfigError(
            "--sparsespec-host-memory-gb",
            value,
            f"at most {largest:.1f}, {MAX_SHARE:.0%} of this machine's memory",
            "Lower it: KV memory is pinned and cannot be swapped out.",
        )
    return value


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # no such controller, or `max`
        return None


def _inactive_file(path: Path) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
