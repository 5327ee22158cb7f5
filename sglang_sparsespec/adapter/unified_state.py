"""What the unified schedule knows of requests on the device, by page-table row, and the inputs of one mixed forward.

By row and not by place in the batch, because drafts that a request holds outlive the round that made them.
Invariant: row 0, length 0, slot 0 is padding, which SGLang keeps for that; what padding computes reaches nothing that
is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_sparsespec.adapter.transfer import to_device
from sglang_sparsespec.speculation.memory import num_bytes
from sglang_sparsespec.speculation.phases import Load, load_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class TurnInputs(NamedTuple):
    """Views of what one mixed forward reads, for a batch size. D tokens of drafts come first, then V verifies."""

    token_rows: torch.Tensor
    """[D + V * (K + 1)], int64, page-table row of each token."""
    token_offsets: torch.Tensor
    """[D + V * (K + 1)], int64, where it stands in its chain; its position is that many past the committed length."""
    verify_rows: torch.Tensor
    """[V], int64."""
    num_queries: torch.Tensor
    """[V], int64, tokens that each of them verifies; 0 in padding."""


class RoundInputs:
    """The inputs of all forwards of one round, made on the host and taken to the device in one copy.

    Args:
        held: [num_reqs], drafts that requests have from the last round.
        phases: [num_reqs], when each verifies.
        num_steps: k, which is K.
        batch_size: that forwards are padded to.
        device: where to.
    """

    def __init__(
        self, held: Sequence[int], phases: Sequence[int], num_steps: int, batch_size: int, device: torch.device
    ) -> None:
        self.load = load_of(batch_size, num_steps)
        num_reqs, width = len(held), num_steps + 1
        # requests by number; the one past the last is padding
        reqs = np.full((width, _num_columns(self.load)), num_reqs)
        numbers = np.zeros_like(reqs)
        # what `phases.turns` says, of all forwards and requests at once: lists of it took 0.9 ms of the host at 128
        has, phase, forward = np.asarray(held), np.asarray(phases), np.arange(width)[:, None]
        offsets = np.where(forward < phase, has + forward, forward - phase - 1)
        is_draft = (forward != phase) & (offsets < num_steps)
        at, req = np.nonzero(is_draft)
        column = is_draft.cumsum(axis=1)[at, req] - 1
        reqs[at, column], numbers[at, column] = req, offsets[at, req]
        # the verifies of a forward in the order of the batch
        everybody, token = np.arange(num_reqs), np.arange(width)
        place = (forward == phase).cumsum(axis=1)[phase, everybody] - 1
        columns = self.load.draft_reqs + place[:, None] * width + token
        reqs[phase[:, None], columns], numbers[phase[:, None], columns] = everybody[:, None], token
        num_drafts = np.minimum(has + phase, num_steps)
        lasts = self.load.num_tokens + place
        reqs[phase, lasts], numbers[phase, lasts] = everybody, num_drafts + 1
        self.num_verified: list[int] = num_drafts.tolist()
        """[num_reqs], drafts that each has to verify."""
        self._num_drafting: list[int] = is_draft.sum(axis=1).tolist()
        self._num_verifying: list[int] = np.bincount(phase, minlength=width).tolist()
        self._reqs, self._numbers = to_device(torch.from_numpy(np.stack([reqs, numbers])), device)

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """What `UnifiedState.load` takes, of every forward, for requests at `rows` ([num_reqs], int64)."""
        return torch.cat([torch.nn.functional.pad(rows, (0, 1))[self._reqs], self._numbers], dim=1)

    def drafting(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the forward `number`, who drafts and what is fed: [num_drafting] int64 each, without padding."""
        count = self._num_drafting[number]
        return self._reqs[number, :count], self._numbers[number, :count]

    def verifying(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the forward `number`, who verifies and how many drafts: [num_verifying] int64 each, without padding."""
        lasts = slice(self.load.num_tokens, self.load.num_tokens + self._num_verifying[number])
        return self._reqs[number, lasts], self._numbers[number, lasts] - 1


class UnifiedState:
    """By page-table row: the committed length, the chain, what drafts see.

    Args:
        num_rows: of the page table, the padding row included.
        max_reqs: most requests of a round, padding included.
        num_steps: K.
        lists: [num_layers, num_rows, num_kv_heads or 1, width], int32, KV slots that drafts see; shared with the rounds
            of the other schedule.
    """

    def __init__(self, *, num_rows: int, max_reqs: int, num_steps: int, lists: torch.Tensor) -> None:
        device = lists.device
        self._num_steps = num_steps
        self.lists = lists
        self.list_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        """[num_rows], int32: entries of a row's lists before the current token's own."""
        self.committed_lens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """[num_rows], int64: n."""
        self.chains = torch.zeros((num_rows, num_steps + 1), dtype=torch.int64, device=device)
        """[num_rows, K + 1], int64: the current token and the drafts after it, as many as there are."""
        # n and the chain of the padding row stay 0
        num_columns = _num_columns(load_of(max_reqs, num_steps))
        self._inputs = torch.zeros(2 * num_columns, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Of what is held here beside the lists."""
        return num_bytes((self.list_lens, self.committed_lens, self.chains, self._inputs))

    def begin(self, rows: torch.Tensor, committed_lens: torch.Tensor, current: torch.Tensor) -> None:
        """Before a round: [num_reqs] each, the rows, n, and the tokens that are committed but not cached."""
        self.committed_lens[rows] = committed_lens
        self.chains[rows, 0] = current

    def load(self, packed: torch.Tensor) -> None:
        """Put the inputs of one forward where it looks for them."""
        self._inputs[: packed.shape[0]].copy_(packed)

    def inputs(self, batch_size: int) -> TurnInputs:
        load = load_of(batch_size, self._num_steps)
        parts = self._inputs[: 2 * _num_columns(load)].split([load.num_tokens, load.verify_reqs] * 2)
        return TurnInputs(parts[0], parts[2], parts[1], parts[3])


def _num_columns(load: Load) -> int:
    """A number for each token, and one for each verify."""
    return load.num_tokens + load.verify_reqs
