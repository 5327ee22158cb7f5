"""The cost model beside the measurement: its W and A are those of the plain server in the same run.

Where the card is known (`cost_model.ROOFLINES`) W and A are also compared with what its bandwidth allows. Elsewhere the
verify's products are taken to cost what a draft's do, which holds while reading weights fills both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench import cost_model
from sglang_sparsespec.bench.cells import Contender
from sglang_sparsespec.bench.shapes import BYTES, ModelShape
from sglang_sparsespec.bench.summary import client_lag
from sglang_sparsespec.config import SparseSpecConfig
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import read_anchors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.bench.cost_model import Roofline, Round
    from sglang_sparsespec.bench.summary import Row

ROOFLINE = {"gather_efficiency": 1.0, "gap_ms": 0.0, "capture_share": 0.0}
MIN_SWEEP = 1.2
"""Largest pool fill over the smallest, for a line through them: repeats of one fill differ by a few tokens."""


@dataclass(frozen=True)
class ModelCheck:
    """One SPARSESPEC cell against the model; times in ms."""

    target: str
    contender: str
    scene: dict[str, Any]
    plain_weights: float
    plain_kv: float
    model: Round
    measured: float
    measured_terms: tuple[float, float] | None
    """(fixed part, part that grows with the pool) of the round; None where the cell has one pool fill."""
    model_terms: tuple[float, float] | None
    """The same two of the model, taken from it in the same way."""
    predicted_speedup: float
    measured_speedup: float | None
    roofline_plain: tuple[float, float] | None
    """(W, A) that the card allows; None for a card that nobody measured."""
    roofline: Round | None
    """The least that a round takes on the card: those W and A, and neither gaps, nor scattered reads, nor capture."""

    def flags(self) -> list[str]:
        """The terms that are off by more than a fifth, in words."""
        found = []
        compared = [("round", self.measured, self.model.total)]
        if self.measured_terms and self.model_terms:
            compared += [
                (name, self.measured_terms[i], self.model_terms[i]) for i, name in enumerate(("fixed part", "KV part"))
            ]
        if self.roofline_plain:
            compared += [("W of plain", self.plain_weights, self.roofline_plain[0])]
            compared += [("A of plain", self.plain_kv, self.roofline_plain[1])]
        for name, measured, model in compared:
            if cost_model.is_off(measured, model):
                found.append(f"{name} {cost_model.deviation(measured, model):+.0%}")
        return found


def check_all(rows: Sequence[Row], provenance: dict[str, Any]) -> tuple[list[ModelCheck], list[str]]:
    """(checks, notes on cells that the model cannot be applied to)."""
    card = cost_model.roofline_of(provenance["machine"])
    # written by versions that knew of one rank
    ranks = provenance.get("tp_size", 1)
    checks, notes = [], []
    for row in rows:
        if "SPARSESPEC" not in row.turns[0]["contender_args"]:
            continue
        if row.scene.get("pool_share", 1.0) < 1:
            notes.append(f"{row.contender} on {row.target}: a pool that is too small is no matter of rounds alone")
            continue
        fit = plain_fit(rows, row.target, row.scene["batch"], row.scene["temperature"])
        if fit is None or min(fit) <= 0:
            notes.append(
                f"{row.contender} on {row.target}, batch {row.scene['batch']}: W and A are not known, for plain "
                "decoding was measured at one pool fill only, or did not slow down with the fill"
            )
            continue
        try:
            checks.append(check(row, fit, card, ranks))
        except ConfigError as error:
            notes.append(f"{row.contender} on {row.target}: {error}")
    return checks, notes


def plain_fit(rows: Sequence[Row], target: str, batch: int, temperature: float) -> tuple[float, float] | None:
    """(W ms, A ms per pool token) from all slices of the baseline with this batch, and this sampling if possible."""
    for same_sampling in (True, False):
        # a client that lags stretches the steps that it sees
        parts = [
            (part["pool_tokens"], part["round_ms"] / client_lag(turn))
            for row in rows
            if row.is_baseline and row.target == target and row.scene["batch"] == batch
            if not same_sampling or row.scene["temperature"] == temperature
            for turn in row.turns
            for part in turn["result"]["slices"]
        ]
        fit = sweep_fit(*zip(*parts, strict=True)) if parts else None
        if fit is not None:
            return fit
    return None


def sweep_fit(fills: Sequence[float], times: Sequence[float]) -> tuple[float, float] | None:
    """The line through times over fills; None where the fills are much the same."""
    return cost_model.fit_step(fills, times) if fills and max(fills) > MIN_SWEEP * min(fills) else None


def check(row: Row, fit: tuple[float, float], card: Roofline | None, ranks: int = 1) -> ModelCheck:
    weights_ms, kv_ms_per_token = fit
    turn = row.turns[0]
    shape = ModelShape(**turn["shape"])
    accept_length = row.medians["accept_length"] or 1.0
    parts = [part for turn in row.turns for part in turn["result"]["slices"]]
    pool, measured = row.medians["pool_tokens"] or 0.0, row.medians["round_ms"] or 0.0

    def model(pool_tokens: float) -> Round:
        return model_round(turn, shape, card, weights_ms, kv_ms_per_token * pool_tokens, pool_tokens, ranks)

    fills = [part["pool_tokens"] for part in parts]
    measured_fit = sweep_fit(fills, [part["round_ms"] for part in parts])
    model_fit = sweep_fit(fills, [model(fill).total for fill in fills])
    at_pool = model(pool)
    roofline_plain = roofline = None
    if card:
        roofline_plain = cost_model.step_times(
            shape, card.times(ranks), rows=row.scene["batch"], pool_tokens=pool, bytes_per_value=BYTES[turn["dtype"]]
        )
        roofline = model_round(turn, shape, card, *roofline_plain, pool, ranks, **ROOFLINE)
    return ModelCheck(
        target=row.target,
        contender=row.contender,
        scene=row.scene,
        plain_weights=weights_ms,
        plain_kv=kv_ms_per_token * pool,
        model=at_pool,
        measured=measured,
        measured_terms=(measured_fit[0], measured_fit[1] * pool) if measured_fit else None,
        model_terms=(model_fit[0], model_fit[1] * pool) if model_fit else None,
        predicted_speedup=cost_model.speedup(accept_length, weights_ms, kv_ms_per_token * pool, at_pool.total),
        measured_speedup=row.ratio,
        roofline_plain=roofline_plain,
        roofline=roofline,
    )


def model_round(
    turn: dict[str, Any],
    shape: ModelShape,
    card: Roofline | None,
    weights_ms: float,
    kv_ms: float,
    pool_tokens: float,
    ranks: int = 1,
    **assumed: float,
) -> Round:
    """The model of one cell; `assumed` replaces what `cost_model.round_time` assumes."""
    contender = Contender(turn["contender"], turn["label"], tuple(turn["contender_args"]))
    defaults = SparseSpecConfig()
    num_steps = int(contender.option("--speculative-num-steps") or defaults.num_steps)
    ratio = float(contender.option("--sparsespec-budget-ratio") or defaults.budget_ratio)
    min_budget = int(contender.option("--sparsespec-min-budget") or defaults.min_budget)
    batch = turn["scene"]["batch"]
    modes = contender.words("--sparsespec-verify-sparsity")
    verified = shape
    if "moe" in modes and contender.option("--sparsespec-verify-experts"):
        num_experts = int(contender.option("--sparsespec-verify-experts") or 0)
        verified = dataclasses.replace(shape, experts_per_token=num_experts)
    verify_ms, extra_ms = weights_ms, 0.0
    if card:
        together = card.times(ranks)
        size = BYTES[turn["dtype"]]
        rows = batch * (num_steps + 1)
        # the products' own growth, on top of what plain was measured to need
        verify_ms += 1e3 * (
            cost_model.products_s(verified, together, rows=rows, bytes_per_value=size)
            - cost_model.products_s(shape, together, rows=batch, bytes_per_value=size)
        )
        # every rank samples from all of the logits
        extra_ms = 1e3 * cost_model.sampling_s(shape, card, rows=rows)
    return cost_model.round_time(
        weights_ms,
        kv_ms,
        num_steps=num_steps,
        kv_share=cost_model.budget_share(pool_tokens / batch, budget_ratio=ratio, min_budget=min_budget),
        verify_ms=verify_ms,
        verify_share=verify_share(contender, pool_tokens / batch) if "attention" in modes else 1.0,
        extra_ms=extra_ms,
        **assumed,
    )


def verify_share(contender: Contender, context: float) -> float:
    """Of the KV that a contender's sparse verify reads, its options given or by default.

    Raises:
        ConfigError: if its anchors file is gone.
    """
    defaults = SparseSpecConfig()
    path, anchor_share = contender.option("--sparsespec-verify-anchors"), 1.0
    if path is not None:
        file = read_anchors(path)
        anchor_share = len(file.anchors) / len(file.sources())
    return cost_model.sparse_verify_share(
        context,
        ratio=float(contender.option("--sparsespec-verify-kv-ratio") or defaults.verify_kv_ratio),
        dense_below=int(contender.option("--sparsespec-verify-dense-below") or defaults.verify_dense_below),
        block_size=int(contender.option("--sparsespec-verify-block-size") or defaults.verify_block_size),
        anchor_share=anchor_share,
    )
