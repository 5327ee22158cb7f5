"""Cells of the study of the controller: a number of requests, their context, an acceptance."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study_client import FAILURES, RequestsEndedError
from study_rounds import (
    Plain,
    RoundLine,
    expected_tokens,
    over_plain,
    pooled_rates,
    rounds_to_settle,
    speed,
    verdict,
)

from sglang_sparsespec.bench.cells import RESERVE_TOKENS, Scene
from sglang_sparsespec.config import SparseSpecConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from study_book import Allowance, Book
    from study_client import PlainServer, Study

    from sglang_sparsespec.bench.cells import Target
    from sglang_sparsespec.bench.measure import PromptSource

WHAT = "cell"
REPEATS = 5
# with fewer a cell that ended early is a failure
LEAST_REPEATS = 3
# rounds of a turn; and of the controller's
TURN_ROUNDS, OWN_ROUNDS = 4, 11
# batches this small have short rounds, whose times scatter more: turns of twice as many
SMALL_BATCH, SMALL_BATCH_FACTOR = 8, 2
# until the controller counts as settled; and the rounds over which its speed is looked at
SETTLE_ROUNDS, SETTLE_WINDOW = 96, 16
# rounds between two turns: in flight when k is set, and until the next turn is asked for
BETWEEN_TURNS = 4
# room beyond the expected tokens of a block's rounds: requests have different luck, and the first ones decode while the
# batch fills up
GROWTH_ROOM, ROOM_TOKENS = 1.15, 96
# taken for real acceptance, which nobody knows before
ASSUMED_RATE = 0.8
# seconds of a cell before one was measured
FIRST_GUESS_S = 15.0
OWN = "own"


class DoesNotFitError(Exception):
    """The KV pool or the model's context is too small for a cell."""


@dataclass(frozen=True)
class Load:
    """What decodes in a cell, and how far its requests may grow."""

    prompts: Sequence[Sequence[int]]
    """Longer than `context` by `growth` at least, for plain decoding at the lengths that the turns reach."""
    context: int
    growth: int
    rates: Sequence[float] | None
    """SIMULATED acceptance by position; None: real."""
    repeats_of_block: int
    """Repeats that one set of requests is there for."""

    @property
    def num_reqs(self) -> int:
        return len(self.prompts)

    @property
    def most_pool(self) -> float:
        """Tokens in the pool with which some request may be at its end."""
        return self.num_reqs * (self.context + 0.98 * self.growth)

    @property
    def starts(self) -> list[Sequence[int]]:
        return [prompt[: self.context] for prompt in self.prompts]


def turn_rounds(batch: int) -> tuple[int, int]:
    """(of a fixed k's turn, of the controller's)."""
    factor = SMALL_BATCH_FACTOR if batch <= SMALL_BATCH else 1
    return factor * TURN_ROUNDS, factor * OWN_ROUNDS


def growths(batch: int, choices: Sequence[int], rates: Sequence[float] | None) -> tuple[float, float]:
    """Tokens of a request that (settling, one repeat) is expected to need, the controller where rounds have most."""
    given = [ASSUMED_RATE] if rates is None else rates
    turn, own = turn_rounds(batch)
    per_round = {k: expected_tokens(given, k) if k > 0 else SparseSpecConfig().plain_steps for k in choices}
    most = max(per_round.values())
    repeat = (own + BETWEEN_TURNS) * most + sum((turn + BETWEEN_TURNS) * tokens for tokens in per_round.values())
    return SETTLE_ROUNDS * most, repeat


def room(
    batch: int, context: int, rates: Sequence[float] | None, choices: Sequence[int], pool: int, model_context: int
) -> tuple[int, int]:
    """(tokens by which each request may grow, repeats of one set of requests), as few sets as pool and context allow.

    Raises:
        DoesNotFitError: not even one repeat, or the settling, fits.
    """
    settle, repeat = growths(batch, choices, rates)
    left = min(pool // batch - RESERVE_TOKENS, model_context - RESERVE_TOKENS) - context
    for repeats in range(REPEATS, 0, -1):
        growth = int(GROWTH_ROOM * max(settle, repeats * repeat)) + ROOM_TOKENS
        # a cell is about its context: short prompts begin again rather than become long ones
        if growth <= left and (repeats == 1 or repeats * repeat <= max(settle, context)):
            return growth, repeats
    raise DoesNotFitError(
        f"{batch} requests of {context} tokens would grow by {growth} each; the pool of {pool} and the model's context "
        f"leave {max(left, 0)}"
    )


def plain_lengths(load: Load, steps: int) -> list[int]:
    """Lengths of prompts behind which plain decoding is measured: where the turns begin, where they end, between."""
    last = max(load.context + load.growth - steps, load.context + 1)
    # where requests hardly grow, times lie on a line
    between = [] if 4 * load.growth < load.context else [(load.context + last) // 2]
    return [load.context, *between, last]


def study_cell(
    study: Study, plain: PlainServer, load: Load, choices: Sequence[int], plain_steps: int
) -> dict[str, Any]:
    """The controller from nothing, then in turns with every fixed k; plain decoding right before and after.

    Raises:
        RequestsEndedError: too few turns before the requests ended.
        ServerError, requests.RequestException: a server failed.
    """
    began = time.monotonic()
    lengths = plain_lengths(load, plain_steps)
    before = plain.points(load.prompts, lengths, plain_steps)
    settling = settle(study, load)
    turns = take_turns(study, load, choices)
    after = plain.points(load.prompts, lengths, plain_steps)
    return {**judge(Plain(before, after), settling, turns, load.rates), "seconds": round(time.monotonic() - began, 2)}


def settle(study: Study, load: Load) -> list[RoundLine]:
    # plain decoding until all are there: it grows requests least
    study.set(0, load.rates)
    with study.running(load.starts, load.growth):
        return study.turn(None, load.rates, SETTLE_ROUNDS, num_reqs=load.num_reqs, most_pool=load.most_pool, fresh=True)


def take_turns(study: Study, load: Load, choices: Sequence[int]) -> dict[int | str, list[list[RoundLine]]]:
    """Rounds of each fixed k and of OWN, by repeat; whole repeats only.

    Raises:
        RequestsEndedError: fewer than LEAST_REPEATS.
    """
    found: dict[int | str, list[list[RoundLine]]] = {what: [] for what in (OWN, *choices)}
    turn, own = turn_rounds(load.num_reqs)
    done = 0
    while done < REPEATS:
        study.set(0, load.rates)
        begun = done
        with study.running(load.starts, load.growth):
            while done < min(begun + load.repeats_of_block, REPEATS):
                order: list[int | str] = [OWN, *choices]
                if done % 2:
                    order.reverse()
                repeat: dict[int | str, list[RoundLine]] = {}
                try:
                    for what in order:
                        k = what if isinstance(what, int) else None
                        count = own if k is None else turn
                        repeat[what] = study.turn(
                            k, load.rates, count, num_reqs=load.num_reqs, most_pool=load.most_pool
                        )
                except RequestsEndedError:
                    break
                for what, rounds in repeat.items():
                    found[what].append(rounds)
                done += 1
        if done == begun:
            # the next ones would end as early
            break
    if done < LEAST_REPEATS:
        raise RequestsEndedError(f"requests ended in repeat {done + 1}, before {LEAST_REPEATS} were whole")
    return found


def judge(
    plain: Plain,
    settling: Sequence[RoundLine],
    turns: dict[int | str, list[list[RoundLine]]],
    rates: Sequence[float] | None,
) -> dict[str, Any]:
    """The numbers of a cell."""
    choices = [k for k in turns if isinstance(k, int)]
    own = [line for rounds in turns[OWN] for line in rounds]
    if rates is None:
        pooled = [line for repeats in turns.values() for rounds in repeats for line in rounds]
        taken: Sequence[float] = pooled_rates(pooled, max(choices))
    else:
        taken = rates
    ratios = {what: [over_plain(rounds, taken, plain) for rounds in repeats] for what, repeats in turns.items()}
    windows = [settling[i : i + SETTLE_WINDOW] for i in range(0, len(settling), SETTLE_WINDOW)]
    on_the_way = [over_plain(window, taken, plain) for window in windows]
    settled = rounds_to_settle(on_the_way)
    pool = statistics.fmean(line.pool_tokens for line in own)
    return {
        **verdict(ratios[OWN], {k: ratios[k] for k in choices}),
        # (tokens per second, tokens in the pool) of each turn, "own" and each k: all that the ratios are made of
        "speeds": {str(what): [rounded(speed(rounds, taken)) for rounds in repeats] for what, repeats in turns.items()},
        "own_k": statistics.mode(line.num_steps for line in own),
        "own_rounds_ms": by_steps(own),
        "fixed_rounds_ms": by_steps([line for k in choices for rounds in turns[k] for line in rounds]),
        "settled_after_rounds": None if settled is None else settled * SETTLE_WINDOW,
        "while_settling_over_plain": [round(ratio, 4) for ratio in on_the_way],
        "rates": [round(rate, 4) for rate in taken],
        "pool_tokens": round(pool),
        "plain_ms": round(plain.step_ms(pool), 4),
        "plain_before": [[round(at), round(ms, 4)] for at, ms in plain.before],
        "plain_after": [[round(at), round(ms, 4)] for at, ms in plain.after],
        "plain_drift": round(plain.drift, 4),
    }


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def by_steps(rounds: Sequence[RoundLine]) -> dict[str, list[float]]:
    """k: [timed rounds, their median ms, their mean ms]: what the controller's rounds took beside those of the same k.

    A mean far above the median says that something held single rounds up.
    """
    times: dict[int, list[float]] = {}
    for line in rounds:
        if line.round_ms is not None:
            times.setdefault(line.num_steps, []).append(line.round_ms)
    return {
        str(k): [len(found), round(statistics.median(found), 3), round(statistics.fmean(found), 3)]
        for k, found in sorted(times.items())
    }


def wanted_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    rates = [None] if args.model else args.rates
    return [
        {"what": WHAT, "batch": batch, "context": context, "rate": rate}
        for batch, context, rate in itertools.product(args.batches, args.contexts, rates)
    ]


def predicted_s(book: Book, cell: dict[str, Any]) -> float:
    """Of a cell: the longest of those like it that were measured, or of all."""
    known = book.of("result", WHAT)
    alike = [r["seconds"] for r in known if (r["batch"], r["context"]) == (cell["batch"], cell["context"])]
    # beside the cell itself: an empty cache, and new prompts
    return 1.2 * max(alike or [r["seconds"] for r in known], default=FIRST_GUESS_S) + 1.0


def run_cells(
    args: argparse.Namespace,
    book: Book,
    time_left: Allowance,
    plain: PlainServer,
    study: Study,
    target: Target,
    source: PromptSource,
) -> bool:
    """Measure what is not on file; False where time was up before all was tried.

    Raises:
        ServerError: a server died.
    """
    choices = study.choices()
    filled: tuple[int, int] | None = None
    for cell in wanted_cells(args):
        if book.has(cell):
            continue
        batch, context = cell["batch"], cell["context"]
        rates = None if cell["rate"] is None else [cell["rate"]]
        try:
            growth, repeats = room(batch, context, rates, choices, args.pool, target.shape.context)
        except DoesNotFitError as error:
            book.note("skip", cell, {"reason": str(error)})
            print(f"skipped: {error}", file=sys.stderr)
            continue
        if not time_left.allows(predicted_s(book, cell)):
            return False
        try:
            if filled != (batch, context):
                plain.forget_prompts()
                study.forget_prompts()
                # the same for every acceptance, so that all but the first find them in the radix cache
                longest = min(args.pool // batch, target.shape.context)
                prompts = source.prompts(Scene(batch, longest, 1), seed=0)
                filled = (batch, context)
            load = Load(prompts, context, growth, rates, repeats)
            book.note("result", cell, study_cell(study, plain, load, choices, args.plain_tokens))
            print(describe(book.of("result", WHAT)[-1]), file=sys.stderr, flush=True)
        except (*FAILURES, RequestsEndedError) as error:
            book.note_failure(cell, error)
            for watched in (plain, study):
                watched.require_alive()
    return True


def describe(cell: dict[str, Any]) -> str:
    return (
        f"{cell['batch']} x {cell['context']}, acceptance {cell['rate'] or 'real'}: {cell['over_plain']} of plain, "
        f"{cell['over_best']} of k={cell['best_k']}, own k {cell['own_k']}, {cell['seconds']} s"
    )


def cells_table(book: Book) -> str:
    """Of everything on file."""
    rows = [
        "| batch x context | acceptance | over plain (range) | best fixed k: over plain | over the best (range) | "
        "own k | settled after rounds | plain ms, drift | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(book.of("result", WHAT), key=lambda r: (r["batch"], r["context"], r["rate"] or 0))
    for r in order:
        rows.append(
            f"| {r['batch']} x {r['context']:,} | {r['rate'] or 'real'} | {r['over_plain']:.3f} "
            f"({r['over_plain_range'][0]:.3f} to {r['over_plain_range'][1]:.3f}) | {r['best_k']}: "
            f"{r['best_over_plain']:.3f} | {r['over_best']:.3f} ({r['over_best_range'][0]:.3f} to "
            f"{r['over_best_range'][1]:.3f}) | {r['own_k']} | {r['settled_after_rounds']} | "
            f"{r['plain_ms']:.2f}, {r['plain_drift']:+.1%} | {'' if r['met'] else 'MISSED'} |"
        )
    for kind in ("skip", "failure"):
        rows += [
            f"\n{kind}: {r['batch']} x {r['context']:,}, acceptance {r['rate'] or 'real'}: "
            f"{(r['reason'].splitlines() or [''])[0]}"
            for r in book.of(kind, WHAT)
        ]
    return "\n".join(rows)
