"""What an operator sees of the rounds, beside SGLang's own accept length and rate.

Three numbers: accept length, budget share, refresh time. They go to Prometheus (`--enable-metrics`) and, every
`--decode-log-interval` rounds, to a log line. Nothing here waits for the device.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator  # noqa: TC003 - contextmanager reads the annotation
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.adapter.server_args import SparseSpecServerArgs
    from sglang_sparsespec.speculation.controller import Status
    from sglang_sparsespec.speculation.schedule_choice import ScheduleStatus

logger = logging.getLogger(__name__)

# arbitrary: long enough to see every layer of many rounds, rare enough that two events per layer cost nothing
TIMED_EVERY = 64
# below this accept length a round earns less than one draft; arbitrary, no evidence for this very value
POOR_ACCEPT_LENGTH = 1.3
POOR_AFTER_VERIFIES = 2000


class RefreshTimer:
    """Time that score capture and selection take in a round, measured in one round out of TIMED_EVERY.

    Args:
        device: of the rounds.
        is_apart: whether they are a step of their own; in a fused verify there is nothing to time.
    """

    def __init__(self, device: str, is_apart: bool) -> None:
        self._on_cuda = device == "cuda"
        self._is_apart = is_apart
        self._round = 0
        self._pending: deque[list[tuple[Any, Any]]] = deque(maxlen=2)
        self._spans: list[tuple[Any, Any]] | None = None
        self.last_ms: float | None = None

    def next_round(self) -> None:
        """Close the round that was timed, start timing another when its turn comes."""
        if self._spans:
            self._pending.append(self._spans)
        self._spans = [] if self._is_apart and self._round % TIMED_EVERY == 0 else None
        self._round += 1
        self._collect()

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Around one layer's capture and selection."""
        if self._spans is None:
            yield
            return
        start = self._now()
        yield
        self._spans.append((start, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        if not self._pending:
            return
        spans = self._pending[0]
        if self._on_cuda:
            if not spans[-1][1].query():
                return
            self.last_ms = sum(start.elapsed_time(end) for start, end in spans)
        else:
            self.last_ms = 1e3 * sum(end - start for start, end in spans)
        self._pending.popleft()


class RoundMetrics:
    """Counts rounds; reports at SGLang's own log interval.

    Args:
        server_args: whether and how often to report.
        num_steps: k.
        is_reporting_rank: one rank of a tensor-parallel group speaks.
        is_fused: whether score capture and selection are part of the verify.
        is_lossy: whether the output may differ from the model's.
        on_report: called at every report, for others who report at the same interval.
    """

    def __init__(
        self,
        server_args: SparseSpecServerArgs,
        num_steps: int,
        is_reporting_rank: bool,
        is_fused: bool,
        is_lossy: bool = False,
        on_report: Callable[[], None] | None = None,
    ) -> None:
        self._on_report = on_report
        self.refresh = RefreshTimer(server_args.device, is_apart=not is_fused)
        self._num_steps = num_steps
        self._interval = server_args.decode_log_interval
        self._speaks = is_reporting_rank
        self._labels = {"model_name": server_args.served_model_name or server_args.model_path}
        self._gauges, self._reason_gauge = None, None
        if server_args.enable_metrics and is_reporting_rank:
            self._gauges, self._reason_gauge = _gauges(self._labels)
        self._reasons: dict[str, str] = {}
        if self._gauges is not None:
            self._gauges["lossy"].set(int(is_lossy))
        self._has_warned = False
        self._verifies = self._accept_tokens = 0
        self._window_verifies = self._window_accept_tokens = 0
        self._rounds = 0
        self._share = 0.0
        self._window_groups: list[int] = []
        self._status: Callable[[], Status | None] = lambda: None
        self._schedule: Callable[[], ScheduleStatus | None] = lambda: None

    def watch(
        self, status: Callable[[], Status | None], schedule: Callable[[], ScheduleStatus | None] = lambda: None
    ) -> None:
        """Whom to ask for k, for the schedule, and why; None where it is fixed."""
        self._status, self._schedule = status, schedule

    def plan(self, kv_lens: list[int], budgets: list[int]) -> None:
        """Note the share of KV that the drafts of a round read, from lengths that the host knows."""
        self._share = sum(map(min, budgets, kv_lens)) / max(1, sum(kv_lens))
        self.refresh.next_round()

    def verified_in(self, num_groups: int) -> None:
        """Note in how many forwards a round verified; more than one where shared prefixes add up to over a pool."""
        self._window_groups.append(num_groups)

    def reserved(self, num_bytes: int) -> None:
        """Note what is held of the device's memory beside the KV pool."""
        if self._gauges is not None:
            self._gauges["memory_bytes"].set(num_bytes)

    def verified(self, num_correct_drafts: list[int]) -> None:
        """Note the outcome of a round, when it has arrived on the host."""
        self._rounds += 1
        self._window_verifies += len(num_correct_drafts)
        self._window_accept_tokens += sum(num_correct_drafts) + len(num_correct_drafts)
        if self._rounds % self._interval == 0:
            self._report()

    def _report(self) -> None:
        accept_length = self._window_accept_tokens / max(1, self._window_verifies)
        self._verifies += self._window_verifies
        self._accept_tokens += self._window_accept_tokens
        self._window_verifies = self._window_accept_tokens = 0
        groups = sum(self._window_groups) / max(1, len(self._window_groups))
        self._window_groups.clear()
        refresh_ms, status, schedule = self.refresh.last_ms, self._status(), self._schedule()
        if self._speaks:
            logger.info(
                "SPARSESPEC: accept length %.2f of %d, budget share %.3f%s%s%s%s",
                accept_length,
                self._num_steps + 1,
                self._share,
                "" if refresh_ms is None else f", selection refresh {refresh_ms:.2f} ms/round",
                "" if groups <= 1 else f", {groups:.2f} verifies/round",
                "" if status is None else f", {_decision(status)}",
                "" if schedule is None else f", {_schedule_decision(schedule)}",
            )
        if self._gauges is not None:
            self._gauges["accept_length"].set(accept_length)
            self._gauges["budget_share"].set(self._share)
            self._gauges["verifies_per_round"].set(groups)
            if refresh_ms is not None:
                self._gauges["selection_refresh_ms"].set(refresh_ms)
            if status is not None:
                self._gauges["num_steps"].set(status.num_steps)
                self._show_reason("k", status.reason)
                self._gauges["predicted_speedup"].set(status.predicted_speedup or 0.0)
                self._gauges["measured_speedup"].set(status.measured_speedup or 0.0)
            if schedule is not None:
                self._gauges["unified"].set(int(schedule.schedule == "unified"))
                self._show_reason("schedule", schedule.reason)
                self._gauges["predicted_unified_ratio"].set(schedule.predicted or 0.0)
                self._gauges["measured_unified_ratio"].set(schedule.measured or 0.0)
        self._warn_if_poor()
        if self._on_report is not None:
            self._on_report()

    def _show_reason(self, what: str, reason: str) -> None:
        assert self._reason_gauge is not None, "metrics are off"
        before = self._reasons.get(what)
        if before is not None and before != reason:
            self._reason_gauge.labels(what=what, reason=before, **self._labels).set(0)
        self._reason_gauge.labels(what=what, reason=reason, **self._labels).set(1)
        self._reasons[what] = reason

    def _warn_if_poor(self) -> None:
        if self._has_warned or not self._speaks or self._verifies < POOR_AFTER_VERIFIES:
            return
        if self._status() is not None:
            # whoever chooses k sees to that
            return
        mean = self._accept_tokens / self._verifies
        if mean < POOR_ACCEPT_LENGTH:
            self._has_warned = True
            logger.warning(
                "SPARSESPEC: mean accept length is %.2f after %d verifies; below %.1f drafting costs more than it "
                "saves. Raise --sparsespec-budget-ratio or --sparsespec-min-budget, lower --speculative-num-steps, or "
                "serve this workload without --speculative-algorithm.",
                mean,
                self._verifies,
                POOR_ACCEPT_LENGTH,
            )


def _decision(status: Status) -> str:
    return (
        f"k {status.num_steps} ({status.reason}), over plain decoding {_times(status.predicted_speedup)} expected, "
        f"{_times(status.measured_speedup)} measured"
    )


def _schedule_decision(status: ScheduleStatus) -> str:
    return (
        f"schedule {status.schedule} ({status.reason}), a unified round's time over a lockstep one's "
        f"{_times(status.predicted)} by the cost model, {_times(status.measured)} measured"
    )


def _times(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{ratio:.2f}"


def _gauges(labels: dict[str, str]) -> tuple[dict[str, Any], Any]:
    """Those with a value, by name; and the one whose value is its label."""
    # SGLang sets PROMETHEUS_MULTIPROC_DIR before anything may import this
    from prometheus_client import Gauge

    texts = {
        "accept_length": "Completion tokens per verify over the last log interval, bonus token included.",
        "budget_share": "Share of the running requests' KV tokens that draft steps select.",
        "lossy": "1 if the output may differ from the model's own (--sparsespec-verify-sparsity), else 0.",
        "memory_bytes": "Device memory reserved beside the KV pool, per rank, bytes.",
        "num_steps": "Drafts per round that the controller wants; with --sparsespec-adaptive only.",
        "predicted_speedup": "Tokens per time over plain decoding's, as the cost model expects; 0: unknown.",
        "measured_speedup": "The same by the times of the last rounds and plain decoding's expected time; 0: unknown.",
        "verifies_per_round": "Fused verifies in a round, mean of the last log interval; above 1 where requests share "
        "prefixes and their lengths add up to more than the pool. 0: not fused, or every round was unified.",
        "unified": "1 if rounds are unified, 0 if lockstep; this and the next two with schedule auto only.",
        "predicted_unified_ratio": "A unified round's time over a lockstep one's, by the cost model; 0: unknown.",
        "measured_unified_ratio": "The same, corrected by the times of rounds of both; 0: unknown.",
        "selection_refresh_ms": "Score capture and selection over all layers of one round, milliseconds.",
    }
    gauges = {
        name: Gauge(f"sglang:sparsespec_{name}", text, labelnames=labels.keys(), multiprocess_mode="mostrecent").labels(
            **labels
        )
        for name, text in texts.items()
    }
    reason = Gauge(
        "sglang:sparsespec_reason",
        "1 for the reason why k, or the schedule, is what it is; 0 for earlier ones.",
        labelnames=("what", "reason", *labels),
        multiprocess_mode="mostrecent",
    )
    return gauges, reason
