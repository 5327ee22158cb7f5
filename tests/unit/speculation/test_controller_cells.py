"""The controller in the cells of its study (scripts/bench/adaptive.py), on a made-up server: SYNTHETIC times."""

from __future__ import annotations

import pytest

from sglang_sparsespec.speculation.controller import Controller
from tests.support.round_simulator import Simulator

# of plain decoding, and of the best fixed k
OVER_PLAIN, OVER_BEST = 0.98, 0.97

CHOICES = (0, 1, 2, 4, 8)
CONTEXTS, RATES = (256, 2048, 16384), (0.5, 0.7, 0.9)


@pytest.mark.parametrize("num_reqs", [1, 8, 32, 128])
def test_never_slower_in_any_cell(num_reqs: int) -> None:
    """36 cells of batch, context and acceptance, once settled: looking around counts, and costs less than the bars."""
    missed = []
    for context in CONTEXTS:
        for rate in RATES:
            server = Simulator(
                num_reqs=lambda now: num_reqs,
                pool_tokens=lambda now, context=context: num_reqs * context,
                rates=lambda now, rate=rate: [rate] * 8,
            )
            controller = Controller(CHOICES)
            server.run(controller, 400)
            tokens, spent = server.total_tokens, server.total_ms
            server.run(controller, 600, start=400)
            speed = (server.total_tokens - tokens) / (server.total_ms - spent) / num_reqs
            over_plain, over_best = speed / server.speed(0, 0), speed / server.speed(server.best(CHOICES, 0), 0)
            if over_plain < OVER_PLAIN or over_best < OVER_BEST:
                missed.append((context, rate, over_plain, over_best))
    assert missed == []


def test_the_cells_ask_for_every_k() -> None:
    """Where one k is best everywhere, a server with that fixed k would do."""
    bests = {
        Simulator(
            num_reqs=lambda now, n=n: n,
            pool_tokens=lambda now, n=n, context=context: n * context,
            rates=lambda now, rate=rate: [rate] * 8,
        ).best(CHOICES, 0)
        for n in (1, 8, 32, 128)
        for context in CONTEXTS
        for rate in RATES
    }
    assert bests == set(CHOICES)
