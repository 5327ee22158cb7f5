"""The tensors of a round at addresses that do not change, so that a captured forward finds them again.

Invariant: rows past the round's requests are padding (page-table row 0, length 0, slot 0, which SGLang keeps for
that), and what padding computes reaches nothing that is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.selection.store import DraftKV
from sglang_sparsespec.speculation.memory import num_bytes

if TYPE_CHECKING:
    from sglang_sparsespec.selection.store import SelectionStore


def dense_columns(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The first `width` columns of [num_reqs, num_columns] as [num_reqs * width].

    Flattening one column gives a view with gaps, which SGLang's rotary kernel for GPUs refuses.
    """
    return tensor[:, :width].flatten().contiguous()


class StaticRound:
    """Inputs of draft steps and of a verify, for up to `max_reqs` requests.

    Args:
        max_reqs: most requests of a round, padding included.
        num_draft_tokens: K + 1, the most that a request verifies.
        store: whose selections the drafts read.
        tail: most positions between a selection and the last draft.
        device: of everything.
    """

    def __init__(
        self, *, max_reqs: int, num_draft_tokens: int, store: SelectionStore, tail: int, device: torch.device | str
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_reqs = max_reqs
        self.rows = zeros(max_reqs)
        """Page-table rows."""
        self.committed_lens = zeros(max_reqs, dtype=torch.int32)
        self.num_queries = zeros(max_reqs, dtype=torch.int32)
        """Tokens that a request verifies: the round's k + 1, or 0 in padding."""
        self.positions = zeros(max_reqs, num_draft_tokens)
        self.slots = zeros(max_reqs, num_draft_tokens)
        self.chain = zeros(max_reqs, num_draft_tokens)
        """The current token and the drafts."""
        # of one draft step; kernels read all three as dense arrays
        self.step_tokens = zeros(max_reqs)
        self.step_positions = zeros(max_reqs)
        self.step_slots = zeros(max_reqs)
        num_layers, num_rows, num_heads, max_budget = store.positions.shape
        self.draft_slots = zeros(num_layers, num_rows, num_heads, max_budget + tail, dtype=torch.int32)
        """[num_layers, num_rows, num_kv_heads or 1, width]: here by place in the batch. The other schedule, which never
        runs in the same round, keeps its lists in them by page-table row."""
        self._draft_lens = zeros(max_reqs, dtype=torch.int32)

    @property
    def num_bytes(self) -> int:
        return num_bytes(tensor for tensor in vars(self).values() if torch.is_tensor(tensor))

    def load(
        self,
        rows: torch.Tensor,
        committed_lens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        draft_kv: DraftKV | None,
        batch_size: int,
        num_queries: int | None = None,
    ) -> None:
        """Take a round in and pad it to `batch_size`.

        Args:
            rows: [num_reqs], int64.
            committed_lens: [num_reqs], integer.
            positions: [num_reqs, K + 1], int64.
            slots: [num_reqs, K + 1], int64.
            draft_kv: what the drafts read; None where a policy finds out step by step, or nothing is drafted.
            batch_size: at least num_reqs.
            num_queries: tokens that each request verifies, k + 1; None: all K + 1.
        """
        num_reqs = rows.shape[0]
        pairs = [
            (self.rows, rows),
            (self.committed_lens, committed_lens),
            (self.positions, positions),
            (self.slots, slots),
        ]
        if draft_kv is not None:
            pairs.append((self._draft_lens, draft_kv.lens))
            self.draft_slots[:, :num_reqs, :, : draft_kv.slots.shape[-1]].copy_(draft_kv.slots)
        for target, value in pairs:
            target[:num_reqs].copy_(value)
            target[num_reqs:batch_size].zero_()
        self.num_queries[:num_reqs].fill_(positions.shape[1] if num_queries is None else num_queries)
        self.num_queries[num_reqs:batch_size].zero_()

    def draft_kv(self, batch_size: int) -> DraftKV:
        """What draft steps of `batch_size` rows read; `lens` counts the step's own token once it has begun."""
        return DraftKV(self.draft_slots[:, :batch_size], self._draft_lens[:batch_size])

    def verified(self, batch_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, positions and slots of a verify of `width` tokens per request; each dense, [batch_size * width]."""
        columns = (dense_columns(tensor[:batch_size], width) for tensor in (self.chain, self.positions, self.slots))
        tokens, positions, slots = columns
        return tokens, positions, slots

    def begin_step(self, step: int, tokens: torch.Tensor, batch_size: int) -> None:
        """Feed one token per request ([num_reqs], int64) at position n + step."""
        self.step_tokens[: tokens.shape[0]].copy_(tokens)
        self.step_positions[:batch_size].copy_(self.positions[:batch_size, step])
        self.step_slots[:batch_size].copy_(self.slots[:batch_size, step])
        self._draft_lens[:batch_size].add_(1)

    def set_chain(self, chain: torch.Tensor, batch_size: int) -> None:
        """[num_reqs, k + 1], int64: what the verify runs over; columns past k + 1 become token 0."""
        self.chain[: chain.shape[0], : chain.shape[1]].copy_(chain)
        self.chain[: chain.shape[0], chain.shape[1] :].zero_()
        self.chain[chain.shape[0] : batch_size].zero_()
