"""The attention of one sparse verify over a PagedModel, token by token or all at once.

Dense and sparse attention are one computation with another mask, so that a mask which leaves nothing out gives the
dense result to the bit. It is an emulation: what is masked is read all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.sparsity.attention import block_scores, choose_blocks, num_kept_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.model import PagedModel


class VerifyRound:
    """What the tokens of one round see: the blocks that the first of them chose, and each other.

    Args:
        model: with the KV of the committed tokens in its pool.
        rows: requests, neighbours in the pool.
        committed_lens: [R], int64: tokens of each request before the round.
        choosing_layers: [layers]: whose blocks each layer reads; `Setting.choosing_layers`.
        ratio: rho; 1 chooses nothing and leaves out nothing.
        dense_below: L0, tokens.
        block_size: tokens.
        apply: False: choose, and attend to everything all the same.
    """

    def __init__(
        self,
        model: PagedModel,
        rows: range,
        committed_lens: torch.Tensor,
        choosing_layers: Sequence[int],
        *,
        ratio: float,
        dense_below: int,
        block_size: int,
        apply: bool = True,
    ) -> None:
        self.model, self.rows, self.committed_lens = model, rows, committed_lens
        self.choosing_layers, self.chooses, self.apply = choosing_layers, ratio < 1, apply
        self.block_size = block_size
        self.num_kept = num_kept_blocks(committed_lens, ratio=ratio, dense_below=dense_below, block_size=block_size)
        self.kept: dict[int, torch.Tensor] = {}
        """By choosing layer: [R, H, blocks], bool."""
        self.row_index = torch.arange(rows.start, rows.stop, device=committed_lens.device)

    def feed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run tokens [R, T] at positions [R, T], in order; the first call of a round holds its first token.

        Returns:
            Logits, [R, T, vocab_size], float32.
        """
        self.positions = positions
        columns = torch.arange(int(positions.max()) + 1, device=positions.device)
        self.causal = columns <= positions[..., None]
        self.is_new = columns >= self.committed_lens[:, None]
        return self.model.forward(tokens, positions, self)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `acceptance.model.Pass`."""
        self.model.write(layer, self.row_index, self.positions, k, v)
        num_rows, num_tokens, num_q_heads, head_dim = q.shape
        num_columns, num_heads = self.causal.shape[-1], self.model.num_kv_heads
        keys, values = self.model.kv(layer, self.rows, num_columns)
        if self.chooses and self.choosing_layers[layer] == layer and layer not in self.kept:
            self.kept[layer] = self._choose(q[:, 0], keys)
        visible = self.causal[:, None]
        if self.chooses and self.apply:
            visible = visible & self._seen(self.kept[self.choosing_layers[layer]], num_columns)[:, :, None]
        group = num_q_heads // num_heads
        # the query heads of a group stand beside the tokens: they share keys
        query = q.view(num_rows, num_tokens, num_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        mask = visible[:, :, None].expand(num_rows, num_heads, group, num_tokens, num_columns)
        out = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(num_rows, num_heads, group * num_tokens, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask.reshape(num_rows, num_heads, group * num_tokens, num_columns),
            scale=scale,
        )
        out = out.view(num_rows, num_heads, group, num_tokens, head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(q.shape)

    def _choose(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[R, H, blocks], bool, from the first token's query [R, HQ, D] and keys [R, columns, H, D]."""
        lengths = self.committed_lens.tolist()
        num_blocks = -(-max(lengths) // self.block_size)
        kept = torch.zeros(len(lengths), keys.shape[2], num_blocks, dtype=torch.bool, device=keys.device)
        for row, (length, num_kept) in enumerate(zip(lengths, self.num_kept.tolist(), strict=True)):
            scores = block_scores(query[row], keys[row], length, self.block_size)
            kept[row].scatter_(1, choose_blocks(scores, num_kept), True)
        return kept

    def _seen(self, kept: torch.Tensor, num_columns: int) -> torch.Tensor:
        """[R, H, columns], bool: tokens of kept blocks and those of the round."""
        tokens = kept.repeat_interleave(self.block_size, dim=2)[..., :num_columns]
        tokens = torch.nn.functional.pad(tokens, (0, num_columns - tokens.shape[-1]))
        # the last block may reach past the committed tokens, into the round's own
        return tokens | self.is_new[:, None]

    def read_share(self) -> float:
        """Share of the committed KV that the round reads, mean over requests, layers and KV heads."""
        if not self.chooses:
            return 1.0
        shares = {}
        for layer, kept in self.kept.items():
            tokens = kept.repeat_interleave(self.block_size, dim=2)
            is_committed = torch.arange(tokens.shape[-1], device=tokens.device) < self.committed_lens[:, None]
            counts = (tokens & is_committed[:, None]).sum(-1)
            shares[layer] = (counts / self.committed_lens[:, None]).double().mean().item()
        return sum(shares[source] for source in self.choosing_layers) / len(self.choosing_layers)
