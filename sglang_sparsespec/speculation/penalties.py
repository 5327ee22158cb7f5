"""Frequency, presence and repetition penalties and min_new_tokens at every position of a verify chain.

SGLang applies one set of penalties to all positions of a verify; here position t sees the outputs before the chain and
the drafts 1 .. t, as it would without speculation. Grammar masks and logit bias come after and are not done here.
Invariant: `penalise_chain` on a chain of accepted tokens equals penalising them one decode at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class PenaltyParams:
    """The penalties of a batch, one row per request; a neutral row leaves its logits as they are."""

    frequency: Tensor
    """[num_reqs], float32; subtracted once per earlier occurrence. Neutral: 0."""
    presence: Tensor
    """[num_reqs], float32; subtracted once if the token occurred. Neutral: 0."""
    repetition: Tensor
    """[num_reqs], float32, positive; scales the logit of a token that occurred towards -inf if above 1. Neutral: 1."""
    min_new_tokens: Tensor
    """[num_reqs], int32; stop tokens are impossible until this many tokens are output. Neutral: 0."""
    stop_token_ids: Tensor
    """[num_reqs, max_stop_tokens], int64, padded with the vocabulary size."""


def penalise_chain(
    logits: Tensor,
    *,
    counts: Tensor,
    output_lens: Tensor,
    chain: Tensor,
    params: PenaltyParams,
) -> None:
    """Penalise the logits of every chain position, in place, each conditioned on the chain up to it.

    Per request, with n the occurrences of a token among the outputs so far: subtract frequency * n and
    presence * [n > 0]; where n > 0, divide what is positive and multiply what is negative by repetition; stop tokens
    become -inf while fewer than min_new_tokens are output.

    Args:
        logits: [num_reqs, chain_len, vocab_size], float32; row t predicts the token after chain[:, t].
        counts: [num_reqs, vocab_size], int32, occurrences among the outputs up to and including chain[:, 0]; not
            changed.
        output_lens: [num_reqs], int32, number of outputs up to and including chain[:, 0].
        chain: [num_reqs, chain_len], int64, the current token and the drafts. A chain of 1 is an ordinary decode.
        params: rows in the order of `logits`.

    Reference: sglang.srt.sampling.penaltylib; order as in SamplingBatchInfo.apply_logits_bias. Deviation: frequency * n
    is one product where the host adds n times, so the two can differ in the last bit.
    """
    chain_len = logits.shape[1]
    frequency, presence = params.frequency.unsqueeze(1), params.presence.unsqueeze(1)
    repetition = params.repetition.unsqueeze(1)
    for t in range(chain_len):
        if t > 0:
            drafts = chain[:, t : t + 1].to(torch.int64)
            counts = counts.scatter_add(1, drafts, torch.ones_like(drafts, dtype=counts.dtype))
        row = logits[:, t]
        has_occurred = counts > 0
        row.sub_(frequency * counts).sub_(presence * has_occurred)
        scale = torch.where(has_occurred, repetition, 1.0)
        row.copy_(torch.where(row < 0, row * scale, row / scale))
    _forbid_stop_tokens(logits, output_lens, params)


def _forbid_stop_tokens(logits: Tensor, output_lens: Tensor, params: PenaltyParams) -> None:
    _, chain_len, vocab_size = logits.shape
    if params.stop_token_ids.shape[1] == 0:
        return
    # padding repeats a real id of the row, so that all writes to one logit agree; a row of padding changes nothing
    first_id = params.stop_token_ids.amin(dim=1, keepdim=True)
    ids = torch.where(params.stop_token_ids < vocab_size, params.stop_token_ids, first_id)
    is_real = (ids < vocab_size).unsqueeze(1)
    ids = ids.clamp(max=vocab_size - 1).unsqueeze(1).expand(-1, chain_len, -1)
    lens = output_lens.unsqueeze(1) + torch.arange(chain_len, device=logits.device)
    is_forbidden = (lens < params.min_new_tokens.unsqueeze(1)).unsqueeze(2) & is_real
    logits.scatter_(2, ids, logits.gather(2, ids).masked_fill(is_forbidden, float("-inf")))


class PenaltyLedger:
    """Occurrences of every token among the outputs of each request that has penalties; the counts stay on the device.

    Costs 4 bytes * vocab_size per request at the high-water mark; requests without penalties should not be started.
    """

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free_slots: list[int] = []
        self._counts: Tensor | None = None  # [capacity, vocab_size], int32
        self._output_lens: Tensor | None = None  # [capacity], int32

    def __contains__(self, rid: str) -> bool:
        return rid in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def start(self, rid: str, output_ids: Sequence[int], vocab_size: int, device: torch.device | str) -> None:
        """Count `output_ids` afresh: a new request, or one that comes back after a retraction."""
        if self._counts is None or self._output_lens is None:
            self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
            self._output_lens = torch.zeros((0,), dtype=torch.int32, device=device)
        if self._counts.shape[1] != vocab_size:
            raise ValueError(f"vocab_size: expected {self._counts.shape[1]} as for earlier requests, got {vocab_size}.")
        if rid not in self._slots:
            if not self._free_slots:
                self._grow()
            self._slots[rid] = self._free_slots.pop()
        slot = self._slots[rid]
        self._counts[slot].zero_()
        self._output_lens[slot].zero_()
        if output_ids:
            tokens = self._to_device(list(output_ids)).unsqueeze(0)
            self.append([rid], tokens, torch.full((1,), len(output_ids), dtype=torch.int32, device=tokens.device))

    def append(self, rids: Sequence[str], tokens: Tensor, lens: Tensor) -> None:
        """Add the outputs of one round.

        Args:
            rids: num_reqs started requests.
            tokens: [num_reqs, width], int64; entries at or past `lens` are ignored.
            lens: [num_reqs], int32, valid entries per row; stays on the device.
        """
        counts, output_lens = self._tensors()
        slots = self._to_device([self._slots[rid] for rid in rids])
        is_valid = torch.arange(tokens.shape[1], device=tokens.device) < lens.unsqueeze(1)
        flat = slots.unsqueeze(1) * counts.shape[1] + tokens.to(torch.int64).masked_fill(~is_valid, 0)
        counts.view(-1).scatter_add_(0, flat.view(-1), is_valid.to(torch.int32).view(-1))
        output_lens.scatter_add_(0, slots, lens.to(torch.int32))

    def stack(self, rids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """counts [num_reqs, vocab_size] and output_lens [num_reqs], int32 copies, in the order of `rids`."""
        counts, output_lens = self._tensors()
        slots = self._to_device([self._slots[rid] for rid in rids])
        return counts.index_select(0, slots), output_lens.index_select(0, slots)

    def drop(self, rid: str) -> None:
        """Forget a request; one that was never started is no error, since an abort can come at any time."""
        slot = self._slots.pop(rid, None)
        if slot is not None:
            self._free_slots.append(slot)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        assert self._counts is not None, "append or stack before the first start"
        assert self._output_lens is not None, "append or stack before the first start"
        return self._counts, self._output_lens

    def _to_device(self, values: list[int]) -> Tensor:
        """A host list as int64 on the ledger's device; from pinned memory, so that the copy does not wait."""
        counts, _ = self._tensors()
        host = torch.tensor(values, dtype=torch.int64, pin_memory=counts.is_cuda)
        return host.to(counts.device, non_blocking=True)

    def _grow(self) -> None:
        counts, output_lens = self._tensors()
        capacity = counts.shape[0]
        added = max(4, capacity)
        self._counts = torch.cat([counts, counts.new_zeros((added, counts.shape[1]))])
        self._output_lens = torch.cat([output_lens, output_lens.new_zeros((added,))])
        self._free_slots.extend(range(capacity + added - 1, capacity - 1, -1))
