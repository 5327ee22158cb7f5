"""How much host memory a server may take for KV, and what rounds beside copies are counted as."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.adapter import host_memory as module
from sglang_sparsespec.adapter import round_clock
from sglang_sparsespec.adapter.host_memory import (
    HostMemory,
    default_host_memory_gb,
    host_memory,
    parse_host_memory_gb,
    resolve_host_memory_gb,
)
from sglang_sparsespec.adapter.round_clock import ROUND_COUNTERS, RoundClock
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.offload_machine import Machine

pytestmark = pytest.mark.adapter

GB = 10**9


@pytest.fixture(autouse=True)
def _machine_of_64_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=64 * GB, available=40 * GB)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)


def test_a_container_has_what_its_group_may_use(tmp_path: Path) -> None:
    """The machine's memory in place of the container's: the kernel would kill the server when the pool fills."""
    assert host_memory(tmp_path) == HostMemory(64 * GB, 40 * GB)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == HostMemory(64 * GB, 40 * GB)
    (tmp_path / "memory.max").write_text(f"{16 * GB}\n")
    (tmp_path / "memory.current").write_text(f"{10 * GB}\n")
    assert host_memory(tmp_path) == HostMemory(16 * GB, 6 * GB)
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {3 * GB}\n")
    assert host_memory(tmp_path) == HostMemory(16 * GB, 9 * GB)
    (tmp_path / "memory.max").write_text(f"{60 * GB}\n")
    assert host_memory(tmp_path) == HostMemory(60 * GB, 40 * GB), "the machine is fuller than the group"


def test_a_container_of_the_old_kind(tmp_path: Path) -> None:
    """Its files lie elsewhere; no limit is a very large one."""
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host_memory(tmp_path) == HostMemory(64 * GB, 40 * GB)
    (folder / "memory.limit_in_bytes").write_text(f"{8 * GB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{9 * GB}\n")
    assert host_memory(tmp_path) == HostMemory(8 * GB, 0)


def test_auto_takes_half_of_what_is_free_and_a_number_is_itself() -> None:
    """A derived budget above the safe share, or a number that is changed behind the user's back."""
    memory = HostMemory(64 * GB, 40 * GB)
    assert resolve_host_memory_gb("auto", memory) == 20
    assert resolve_host_memory_gb(parse_host_memory_gb("51.2"), memory) == 51.2
    assert resolve_host_memory_gb(parse_host_memory_gb("0"), memory) == 0
    with pytest.raises(ConfigError, match=r"^--sparsespec-host-memory-gb is 51.3; it must be at most 51.2, 80% of"):
        resolve_host_memory_gb(51.3, memory)
    with pytest.raises(ConfigError, match=r"^--sparsespec-host-memory-gb is 'much'; it must be auto or a number"):
        resolve_host_memory_gb(parse_host_memory_gb("much"), memory)


@pytest.mark.usefixtures("_registered")
def test_the_server_takes_auto(server_args: Callable[..., Any]) -> None:
    """An option that is parsed and then dropped; or admission that stays cautious."""
    args = server_args(sparsespec_host_memory_gb="auto")
    free = min(40, host_memory().free / GB)
    assert args.sparsespec_config.host_memory_gb == pytest.approx(free / 2, rel=0.1)
    assert args.schedule_conservativeness == 0.1


@pytest.mark.usefixtures("_registered")
def test_left_out_it_depends_on_the_device(server_args: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU server that prefills requests again beside idle RAM; or a CPU that copies its memory to itself."""
    assert default_host_memory_gb("cuda", is_verify_sparse=False) == "auto"
    assert default_host_memory_gb("cuda", is_verify_sparse=True) == 0
    assert default_host_memory_gb("cpu", is_verify_sparse=False) == 0
    args = server_args()
    assert (args.sparsespec_host_memory_gb, args.sparsespec_config.host_memory_gb) == (0, 0)
    assert args.schedule_conservativeness == 1.0
    # as on a GPU
    monkeypatch.setattr("sglang_sparsespec.adapter.server_args.default_host_memory_gb", lambda *args, **kwargs: "auto")
    args = server_args()
    assert args.sparsespec_host_memory_gb == "auto"
    assert args.sparsespec_config.host_memory_bytes > 0
    assert args.schedule_conservativeness == 0.1
    assert server_args(sparsespec_host_memory_gb=0).sparsespec_config.host_memory_bytes == 0


@pytest.mark.usefixtures("_registered")
def test_auto_is_at_most_two_pools(machine: Callable[..., Machine]) -> None:
    """Hundreds of gigabytes pinned that no load can fill."""
    small = machine(host_blocks=3, sparsespec_host_memory_gb="auto")
    assert small.offloader._moves.host.num_blocks == 3
    large = machine(host_blocks=1000, sparsespec_host_memory_gb="auto")
    pool_bytes = large.allocator.size * large.offloader._moves.host.bytes_per_token
    assert large.offloader._moves.host.num_bytes == 2 * pool_bytes
    assert machine(host_blocks=1000).offloader._moves.host.num_blocks == 1000


def test_rounds_are_timed_by_what_ran_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill, an idle second or a round of an empty pool among them would be taken for the cost of a copy."""
    now = 0.0
    monkeypatch.setattr(round_clock.time, "perf_counter", lambda: now)
    counts: dict[str, float] = dict.fromkeys(ROUND_COUNTERS, 0)
    clock = RoundClock(counts)

    def tick(seconds: float, *, follows: bool = True, full: bool = True, out: bool = False, back: bool = False) -> None:
        nonlocal now
        now += seconds
        clock.tick(follows_round=follows, is_full=full, out=out, back=back)

    tick(50.0)
    tick(1.0, out=True)
    tick(2.0, back=True)
    tick(3.0, out=True, back=True)
    tick(4.0)
    tick(90.0, follows=False, full=False)
    tick(90.0)
    tick(5.0)
    assert {name: value for name, value in counts.items() if value} == {
        "full_pool_rounds": 2,
        "full_pool_round_seconds": 6.0,
        "one_copy_rounds": 2,
        "one_copy_round_seconds": 5.0,
        "both_copies_rounds": 1,
        "both_copies_round_seconds": 4.0,
    }
