"""The selections in force: one per running request and layer, kept by position until the next refresh.

Positions, not slots: a slot may change under a request (the radix cache replaces duplicates after a prefill), a
position does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_sparsespec.speculation.memory import LAYOUT_BYTES, LAYOUT_ENTRY_BYTES, num_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.selection.base import Selection


class DraftKV(NamedTuple):
    """The KV slots that the draft steps of one round read."""

    slots: torch.Tensor
    """[num_layers, num_reqs, num_kv_heads or 1, width], int32. Garbage past the length of a step."""
    lens: torch.Tensor
    """[num_reqs], int32: entries that are visible. Before the first step those before the first drafted token."""
    places: torch.Tensor | None = None
    """[num_queries], integer: which of the lists each query reads, where `lens` are by query; None: its own."""

    def advanced(self) -> DraftKV:
        """One more drafted token is visible."""
        return self._replace(lens=self.lens + 1)

    def layer_kv(
        self, layer: int, query: torch.Tensor, k_cache: torch.Tensor, *, scale: float, logit_cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What one draft step reads in one layer, whatever its query.

        Args:
            layer: index of the layer.
            query: [num_reqs, num_q_heads, head_dim].
            k_cache: [num_slots, num_kv_heads, head_dim], the step's own key included.
            scale: factor on the logits.
            logit_cap: soft cap of the logits; 0 is off.

        Returns:
            slots [num_reqs, num_kv_heads or 1, width] int32, and how many of them are visible, [num_reqs] int32.
        """
        return self.slots[layer], self.lens


def lay_out(
    selected: torch.Tensor,
    num_selected: torch.Tensor,
    until: torch.Tensor,
    rows: torch.Tensor,
    req_to_token: torch.Tensor,
    *,
    tail: int,
) -> torch.Tensor:
    """Slots of the selected positions, then of every position since the selection was made.

    Args:
        selected: [..., num_reqs, num_kv_heads or 1, max_selected], int32, positions; anything past `num_selected`.
        num_selected: [num_reqs], int32.
        until: [num_reqs], int32, first position of the tail.
        rows: [num_reqs], int64, page-table rows.
        req_to_token: [num_rows, max_context], int32, position -> slot.
        tail: bound of the positions from `until` to the last drafted one.

    Returns:
        [..., num_reqs, num_kv_heads or 1, max_selected + tail], int32; a slot of the request past the end of the list.
    """
    entry = torch.arange(selected.shape[-1] + tail, device=rows.device, dtype=torch.int32)
    # entries [0, num_selected)        selected positions
    # entries [num_selected, ...)      positions until, until + 1, ... up to the step's own token
    recent = until[:, None] + entry - num_selected[:, None]
    is_selected = entry < num_selected[:, None]
    positions = torch.where(is_selected[:, None], torch.nn.functional.pad(selected, (0, tail)), recent[:, None])
    positions = positions.clamp_(0, req_to_token.shape[1] - 1)
    return req_to_token[rows[:, None, None], positions.long()]


class SavedSelection(NamedTuple):
    """The selections of one request, all layers, away from its row."""

    positions: torch.Tensor
    """[num_layers, num_kv_heads or 1, width], int32."""
    num_selected: torch.Tensor
    """[1], int32."""
    until: torch.Tensor
    """[1], int32."""
    is_stale: bool = False
    """Whether tokens were decoded since without a new selection: more than drafts can see beside it."""


class SelectionStore:
    """Selected positions by layer and page-table row.

    Args:
        num_layers: attention layers.
        num_rows: rows of the page table (`req_to_token`), the padding row included.
        num_heads: KV heads on this rank, or 1 where heads share.
        max_budget: tokens that a request may select at most.
        device: where.
    """

    def __init__(
        self, *, num_layers: int, num_rows: int, num_heads: int, max_budget: int, device: torch.device | str
    ) -> None:
        self.positions = torch.zeros(num_layers, num_rows, num_heads, max_budget, dtype=torch.int32, device=device)
        self.num_selected = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.until = torch.zeros(num_rows, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        return num_bytes((self.positions, self.num_selected, self.until))

    def write(self, layer: int, rows: torch.Tensor, selection: Selection) -> None:
        """Replace one layer's selection of the requests at `rows` ([num_reqs], int64)."""
        self.write_layers(layer, rows, selection._replace(positions=selection.positions[None]))

    def write_layers(self, first_layer: int, rows: torch.Tensor, selection: Selection) -> None:
        """Replace the selections of some layers; positions are [num_layers, num_reqs, num_heads, max_budget]."""
        # made under a bound of the lengths that may pass the context limit; what lies beyond the store is padding
        width = min(selection.positions.shape[-1], self.positions.shape[-1])
        layers = slice(first_layer, first_layer + selection.positions.shape[0])
        self.positions[layers, rows, :, :width] = selection.positions[..., :width]
        # the same for every layer of a refresh
        self.num_selected[rows] = selection.num_selected
        self.until[rows] = selection.until

    def save(self, row: int, max_selected: int, copy: Callable[[torch.Tensor], torch.Tensor]) -> SavedSelection:
        """Copies of one row's selections.

        Args:
            row: of the page table.
            max_selected: bound of what this request selected, known to the host.
            copy: makes a copy of a tensor, where and when the caller likes.
        """
        width = min(max_selected, self.positions.shape[-1])
        return SavedSelection(
            copy(self.positions[:, row, :, :width].contiguous()),
            copy(self.num_selected[row : row + 1]),
            copy(self.until[row : row + 1]),
        )

    def load(self, row: int, saved: SavedSelection) -> None:
        """Put saved selections into a row, which may be another one: positions do not depend on it."""
        self.positions[:, row, :, : saved.positions.shape[-1]].copy_(saved.positions, non_blocking=True)
        self.num_selected[row : row + 1].copy_(saved.num_selected, non_blocking=True)
        self.until[row : row + 1].copy_(saved.until, non_blocking=True)

    def draft_kv(
        self,
        rows: torch.Tensor,
        committed_lens: torch.Tensor,
        req_to_token: torch.Tensor,
        *,
        max_selected: int,
        tail: int,
    ) -> DraftKV:
        """Lay out what a round's draft steps read: the selected slots, then every slot since the selection was made.

        Args:
            rows: [num_reqs], int64, page-table rows.
            committed_lens: [num_reqs], integer: tokens whose KV is exact; the first drafted token goes there.
            req_to_token: [num_rows, max_context], int32, position -> slot.
            max_selected: bound of what these requests selected, known to the host.
            tail: bound of the positions from `until` to the last drafted one.
        """
        num_selected, until = self.num_selected[rows], self.until[rows]
        num_layers, _, num_heads, max_budget = self.positions.shape
        shape = (num_layers, rows.shape[0], num_heads, min(max_selected, max_budget) + tail)
        slots = torch.empty(shape, dtype=torch.int32, device=rows.device)
        # some layers at a time: one long request widens the lists of all
        step = max(1, LAYOUT_BYTES // max(1, LAYOUT_ENTRY_BYTES * slots[0].numel()))
        for first in range(0, num_layers, step):
            layers = slice(first, first + step)
            selected = self.positions[layers, rows, :, :max_selected]
            slots[layers] = lay_out(selected, num_selected, until, rows, req_to_token, tail=tail)
        return DraftKV(slots, num_selected + (committed_lens.to(torch.int32) - until))
