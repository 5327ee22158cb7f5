"""What an operator sees of requests in host memory: how many, how much, how fast, and what it cost.

To Prometheus (`--enable-metrics`) and to a log line at SGLang's decode log interval.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.kv.ledger import OffloadLedger
    from sglang_sparsespec.kv.offload import HostPool, Transfer

from sglang_sparsespec.adapter.round_clock import ROUND_COUNTERS, RoundClock

logger = logging.getLogger(__name__)

Direction = Literal["out", "in"]

GAUGES = {
    "offloaded_requests": "Requests that wait in host memory, or are on the way there or back.",
    "host_memory_bytes": "Host memory held by their KV.",
    "host_memory_limit_bytes": "Host memory that there is for KV on this rank.",
    "offload_most_moves": "How often the request that has moved most since the start has left for host memory.",
    "copy_out_bytes_per_second": "Speed of the last copy of KV to host memory.",
    "copy_in_bytes_per_second": "Speed of the last copy of KV from host memory.",
}
COUNTERS = {
    "offloads": "Requests that left for host memory.",
    "copied_out_bytes": "KV copied to host memory.",
    "shared_out_bytes": "KV that did not have to be copied out: another request with the same prefix had brought it.",
    "copied_in_bytes": "KV copied from host memory.",
    "copy_out_seconds": "Time that copies of KV to host memory took.",
    "copy_in_seconds": "Time that copies of KV from host memory took.",
    "offload_stalls": "Times that the scheduler waited for a copy to end.",
    "offload_lost_rounds": "Rounds whose result was dropped because the request left while it was in flight.",
    "offload_short_stays": "Requests that left again before their minimum stay was over.",
    "offload_refusals": "Requests retracted: host memory was full, or they could not move.",
    **ROUND_COUNTERS,
}


class OffloadMetrics:
    """Counts moves; `report` publishes.

    Args:
        server_args: whether to publish, and under which name.
        is_reporting_rank: one rank of a tensor-parallel group speaks.
    """

    def __init__(self, server_args: SparseSpecServerArgs, is_reporting_rank: bool) -> None:
        self._speaks = is_reporting_rank
        self._series = _series(server_args) if server_args.enable_metrics and is_reporting_rank else None
        self._published: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.clock = RoundClock(self.counts)
        self._speed: dict[str, float] = {"out": 0.0, "in": 0.0}
        self.most_moves = 0
        """Of one request."""
        self._host: HostPool | None = None
        self._ledger: OffloadLedger[Any] | None = None

    def watch(self, host: HostPool, ledger: OffloadLedger[Any]) -> None:
        """Whose levels to report."""
        self._host, self._ledger = host, ledger
        self._publish()

    def left(self, *, lost_round: bool) -> None:
        """A request leaves the device."""
        self.counts["offloads"] += 1
        self.counts["offload_lost_rounds"] += lost_round

    def shared(self, num_bytes: int) -> None:
        """A request leaves with so much of its KV in host memory already."""
        self.counts["shared_out_bytes"] += num_bytes

    def moved(self, num_moves: int, *, was_settling: bool) -> None:
        """A request has left for the `num_moves`-th time; or again, before its minimum stay was over."""
        self.most_moves = max(self.most_moves, num_moves)
        self.counts["offload_short_stays"] += was_settling

    def copied(self, transfer: Transfer, direction: Direction) -> None:
        """A copy is done."""
        self.counts[f"copied_{direction}_bytes"] += transfer.num_bytes
        seconds = transfer.seconds()
        self.counts[f"copy_{direction}_seconds"] += seconds
        # what others with the same prefix have brought does not cross again
        if seconds > 0 and transfer.num_bytes > 0:
            self._speed[direction] = transfer.num_bytes / seconds

    def stalled(self) -> None:
        """The scheduler has to wait for a copy."""
        self.counts["offload_stalls"] += 1

    def refused(self) -> None:
        """A request is retracted: host memory is full, or it cannot move."""
        self.counts["offload_refusals"] += 1

    def report(self) -> None:
        """Publish; and say something if there is anything to say."""
        self._publish()
        if not self._speaks or self._host is None or self._ledger is None or self.counts["offloads"] == 0:
            return
        logger.info(
            "SPARSESPEC: %d requests in host memory, %.2f of %.2f GB; since the start %d left, %.2f GB out, %.2f in, "
            "last copies %.1f and %.1f GB/s, %d stalls, %d lost rounds, %d retracted, most moves of a request %d",
            len(self._ledger),
            self._host.used_bytes / 1e9,
            self._host.num_bytes / 1e9,
            self.counts["offloads"],
            self.counts["copied_out_bytes"] / 1e9,
            self.counts["copied_in_bytes"] / 1e9,
            self._speed["out"] / 1e9,
            self._speed["in"] / 1e9,
            self.counts["offload_stalls"],
            self.counts["offload_lost_rounds"],
            self.counts["offload_refusals"],
            self.most_moves,
        )

    def _publish(self) -> None:
        if self._series is None or self._host is None or self._ledger is None:
            return
        self._series["offloaded_requests"].set(len(self._ledger))
        self._series["host_memory_bytes"].set(self._host.used_bytes)
        self._series["host_memory_limit_bytes"].set(self._host.num_bytes)
        self._series["offload_most_moves"].set(self.most_moves)
        for direction, speed in self._speed.items():
            self._series[f"copy_{direction}_bytes_per_second"].set(speed)
        for name, count in self.counts.items():
            self._series[name].inc(count - self._published[name])
        self._published = dict(self.counts)


def _series(server_args: SparseSpecServerArgs) -> dict[str, Any]:
    # SGLang sets PROMETHEUS_MULTIPROC_DIR before anything may import this
    from prometheus_client import Counter, Gauge

    labels = {"model_name": server_args.served_model_name or server_args.model_path}
    gauges = {
        name: Gauge(f"sglang:sparsespec_{name}", text, labelnames=labels.keys(), multiprocess_mode="mostrecent")
        for name, text in GAUGES.items()
    }
    counters = {
        name: Counter(f"sglang:sparsespec_{name}", text, labelnames=labels.keys()) for name, text in COUNTERS.items()
    }
    return {name: series.labels(**labels) for name, series in {**gauges, **counters}.items()}
