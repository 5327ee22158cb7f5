"""The two servers of a study: requests that decode on them, and rounds of a chosen k."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import requests
from study_rounds import LinesFile, RoundLine, RoundsFile, plain_point
from study_server import prefills_file, rounds_file

from sglang_sparsespec.bench.client import run_requests
from sglang_sparsespec.bench.server import Server, ServerError
from sglang_sparsespec.config import SparseSpecConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ROUND_TIMEOUT_S = 60.0
FILL_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 60.0
POLL_S = 0.005
# steps of a full batch that are not looked at: kernels load, and the last prefill is still near
WARM_STEPS = 3
# of a batch that fills up while its first requests decode already, at least
FILL_STEPS = 24
# rounds behind a change of k that were planned before it, or are the first of their kind
SWITCH_ROUNDS = 1


# the launcher ends a moment after the scheduler that failed
DEATH_S = 3.0
# of a server, in whatever call it shows
FAILURES = (ServerError, requests.RequestException)


def write_control(path: Path, settings: Mapping[str, Any]) -> None:
    """Whole or not at all: the server may look at any moment."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(settings))
    draft.replace(path)


class RequestsEndedError(RuntimeError):
    """The requests of a cell were about to end, or ended, before its turns did."""


class Watched:
    """A server of study_server.py, plain or not."""

    def __init__(self, server: Server, control: Path) -> None:
        self.server = server
        self._control = control
        self._file = RoundsFile(rounds_file(control))
        self._prefills = LinesFile(prefills_file(control))

    def new_prefills(self) -> list[Any]:
        """[seconds, requests, tokens, ms or None] of those that were written since the last call."""
        return self._prefills.new()

    def new_rounds(self) -> list[RoundLine]:
        """Those that were written since the last call."""
        return self._file.new()

    def forget_prompts(self) -> None:
        """Empty the radix cache; the server is idle, but may not know it yet.

        Raises:
            ServerError: it is not.
        """
        self.drain()
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            try:
                return self.server.flush_cache()
            except ServerError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def require_alive(self) -> None:
        """After a failure.

        Raises:
            ServerError: the server died of it.
        """
        time.sleep(DEATH_S)
        self.server.check_alive("at the failure")

    def drain(self) -> None:
        """Abort what runs, and wait until nothing does."""
        self.server.post("/abort_request", {"rid": "", "abort_all": True})
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            self.server.check_alive("while it became idle")
            load = self.server.loads()
            if load["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0:
                return
            if time.monotonic() > deadline:
                raise ServerError(f"not idle after {IDLE_TIMEOUT_S:.0f} s: {load}\n{self.server.describe()}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def running(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator[None]:
        """All requests decode while the block runs; what is left of them is aborted."""
        sampling = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        failures: list[BaseException] = []

        def send() -> None:
            try:
                run_requests(self.server.url, prompts, sampling, concurrency=len(prompts), timeout_s=600)
            except BaseException as error:
                failures.append(error)

        self.new_rounds()
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + FILL_TIMEOUT_S
            while all(line.num_reqs < len(prompts) for line in self.new_rounds()):
                if failures:
                    raise failures[0]
                self.server.check_alive("while its batch filled up")
                if time.monotonic() > deadline:
                    raise ServerError(f"never {len(prompts)} requests at a time\n{self.server.describe()}")
                time.sleep(POLL_S)
            yield
        finally:
            # a server that died has nothing to abort, and its death is what the caller should hear of
            with contextlib.suppress(*FAILURES):
                self.drain()
            thread.join(timeout=60)


class PlainServer(Watched):
    """SGLang as it is."""

    def points(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], steps: int
    ) -> tuple[tuple[float, float], ...]:
        """(tokens in the pool, ms of a decode step) behind the first `lengths` tokens of each prompt.

        Raises:
            ServerError: a batch was never full for long enough.
        """
        # the first requests decode until the last have come
        fill = max(FILL_STEPS, 2 * len(prompts))
        sampling = {"temperature": 0.0, "max_new_tokens": steps + WARM_STEPS + fill, "ignore_eos": True}
        found = []
        for length in lengths:
            self.new_rounds()
            cut = [prompt[:length] for prompt in prompts]
            run_requests(self.server.url, cut, sampling, concurrency=len(cut), timeout_s=300)
            full = [line for line in self.new_rounds() if line.num_reqs == len(cut)]
            found.append(plain_point(full[WARM_STEPS:]))
        return tuple(found)


class Study(Watched):
    """The server whose rounds are set and watched."""

    def __init__(self, server: Server, control: Path) -> None:
        super().__init__(server, control)
        self._labels = itertools.count()
        self._fresh = 0

    def choices(self) -> tuple[int, ...]:
        """Every k that the controller may choose, ascending."""
        most = self.server.get("/server_info")["speculative_num_steps"]
        return SparseSpecConfig(num_steps=most, adaptive=True).step_choices

    def set(self, k: int | None, rates: Sequence[float] | None, *, fresh: bool = False) -> str:
        """From the next round on; returns the label that its rounds carry."""
        self._fresh += fresh
        label = f"turn {next(self._labels)}"
        write_control(self._control, {"k": k, "rates": rates, "fresh": self._fresh, "label": label})
        return label

    def turn(
        self,
        k: int | None,
        rates: Sequence[float] | None,
        count: int,
        *,
        num_reqs: int,
        most_pool: float,
        fresh: bool = False,
    ) -> list[RoundLine]:
        """Set k and wait for so many rounds of it, after those of the switch.

        Args:
            num_reqs: requests of each round.
            most_pool: tokens in the pool with which requests are near their ends.

        Raises:
            RequestsEndedError: a request ended, or is about to.
            ServerError: the rounds do not come.
        """
        label = self.set(k, rates, fresh=fresh)
        deadline = time.monotonic() + ROUND_TIMEOUT_S
        found: list[RoundLine] = []
        while len(found) < SWITCH_ROUNDS + count:
            found += [line for line in self.new_rounds() if line.label == label]
            if any(line.num_reqs < num_reqs or line.pool_tokens > most_pool for line in found):
                raise RequestsEndedError(f"after {len(found)} of {count} rounds, {found[-1].pool_tokens} tokens")
            self.server.check_alive("in a turn")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{len(found)} of {count} rounds in {ROUND_TIMEOUT_S:.0f} s\n{self.server.describe()}"
                )
            time.sleep(POLL_S)
        return found[SWITCH_ROUNDS:]
