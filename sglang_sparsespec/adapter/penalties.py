"""Penalties of a batch: which rows have any, their parameters on the device, and the outputs counted so far.

SGLang's own penalizers lag behind a round and hold for all positions of a verify alike, so they are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.adapter.transfer import to_device
from sglang_sparsespec.speculation.penalties import PenaltyLedger, PenaltyParams, penalise_chain

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_sparsespec.speculation.acceptance import Acceptance


def has_penalties(req: Req) -> bool:
    params = req.sampling_params
    return (
        params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
    )


class PenalisedRows:
    """The rows of one batch that have penalties, for the length of a round."""

    def __init__(self, reqs: list[Req], rows: list[int], ledger: PenaltyLedger, vocab_size: int, device: str) -> None:
        self.rids = [reqs[row].rid for row in rows]
        self.rows = to_device(torch.tensor(rows), device)
        self.params = _params([reqs[row] for row in rows], vocab_size, device)
        self._counts, self._output_lens = ledger.stack(self.rids)
        self._draft_counts, self._drafted = self._counts, 0

    def penalise_draft(self, logits: torch.Tensor, current: torch.Tensor) -> None:
        """Penalise the logits of one draft step in place.

        Args:
            logits: [num_reqs, vocab_size].
            current: [num_reqs], int64, the token that was fed: the round's first, then its drafts.
        """
        fed = current[self.rows, None]
        if self._drafted > 0:
            self._draft_counts = self._draft_counts.scatter_add(1, fed, torch.ones_like(fed, dtype=torch.int32))
        chosen = logits[self.rows, None].float()
        penalise_chain(
            chosen,
            counts=self._draft_counts,
            output_lens=self._output_lens + self._drafted,
            chain=fed,
            params=self.params,
        )
        logits[self.rows] = chosen[:, 0].to(logits.dtype)
        self._drafted += 1

    def penalise_verify(self, logits: torch.Tensor, chain: torch.Tensor) -> None:
        """Penalise the logits of a whole verify in place, each position after the chain up to it.

        Args:
            logits: [num_reqs, num_draft_tokens, vocab_size].
            chain: [num_reqs, num_draft_tokens], int64, the current token and the drafts.
        """
        chosen = logits[self.rows].float()
        penalise_chain(
            chosen,
            counts=self._counts,
            output_lens=self._output_lens,
            chain=chain[self.rows],
            params=self.params,
        )
        logits[self.rows] = chosen.to(logits.dtype)


class Penalties:
    """Follows the outputs of every request that has penalties."""

    def __init__(self, vocab_size: int, device: str) -> None:
        self._ledger = PenaltyLedger()
        self._vocab_size = vocab_size
        self._device = device

    def start(self, batch: ScheduleBatch, next_tokens: torch.Tensor) -> None:
        """Count afresh after a prefill; a later chunk of the same prompt counts afresh again.

        Args:
            batch: prefilled requests; those that were retracted have outputs already.
            next_tokens: [num_reqs], the sampled tokens.
        """
        rows = [row for row, req in enumerate(batch.reqs) if has_penalties(req)]
        if not rows:
            return
        for row in rows:
            req = batch.reqs[row]
            self._ledger.start(req.rid, req.output_ids, self._vocab_size, self._device)
        tokens = next_tokens[to_device(torch.tensor(rows), self._device), None].long()
        lens = torch.ones(len(rows), dtype=torch.int32, device=self._device)
        self._ledger.append([batch.reqs[row].rid for row in rows], tokens, lens)

    def resume(self, req: Req) -> None:
        """Count a request afresh that runs on without a prefill; its last output is the round's first token."""
        if has_penalties(req):
            self._ledger.start(req.rid, req.output_ids, self._vocab_size, self._device)

    def rows_of(self, batch: ScheduleBatch) -> PenalisedRows | None:
        """The penalised rows of a batch, or None."""
        rows = [row for row, req in enumerate(batch.reqs) if req.rid in self._ledger]
        if not rows:
            return None
        return PenalisedRows(batch.reqs, rows, self._ledger, self._vocab_size, self._device)

    def append(self, rows: PenalisedRows, acceptance: Acceptance) -> None:
        """Count the outputs of a round."""
        self._ledger.append(rows.rids, acceptance.accept_tokens[rows.rows], acceptance.accept_lens[rows.rows])

    def drop(self, rid: str) -> None:
        """Forget a request that ended."""
        self._ledger.drop(rid)


def _params(reqs: list[Req], vocab_size: int, device: str) -> PenaltyParams:
    sampling = [req.sampling_params for req in reqs]
    stop_ids = [torch.tensor(_stop_token_ids(req), dtype=torch.int64) for req in reqs]
    return PenaltyParams(
        frequency=to_device(torch.tensor([p.frequency_penalty for p in sampling]), device),
        presence=to_device(torch.tensor([p.presence_penalty for p in sampling]), device),
        repetition=to_device(torch.tensor([p.repetition_penalty for p in sampling]), device),
        min_new_tokens=to_device(torch.tensor([p.min_new_tokens for p in sampling], dtype=torch.int32), device),
        stop_token_ids=to_device(
            torch.nn.utils.rnn.pad_sequence(stop_ids, batch_first=True, padding_value=vocab_size), device
        ),
    )


def _stop_token_ids(req: Req) -> list[int]:
    """What min_new_tokens forbids: the rule of the host's BatchedMinNewTokensPenalizer."""
    if req.sampling_params.min_new_tokens == 0:
        return []
    ids = set(req.sampling_params.stop_token_ids or ()) | set(req.tokenizer.additional_stop_token_ids or ())
    if req.tokenizer.eos_token_id is not None:
        ids.add(req.tokenizer.eos_token_id)
    return sorted(ids)
