"""Tokens of the KV pool into rows and back: every element where it belongs, and no other touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.ops.kv_tokens import KvBuffers, gather_tokens, scatter_tokens
from sglang_sparsespec.ops.kv_tokens.reference import gather_tokens_reference, scatter_tokens_reference

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SLOTS, NUM_ROWS = 50, 24


def functions(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    if backend == "triton":
        from sglang_sparsespec.ops.kv_tokens.triton_impl import gather_tokens_triton, scatter_tokens_triton

        return gather_tokens_triton, scatter_tokens_triton
    if backend == "torch-cuda":
        from sglang_sparsespec.ops.kv_tokens.torch_impl import gather_tokens_torch, scatter_tokens_torch

        return gather_tokens_torch, scatter_tokens_torch
    return gather_tokens, scatter_tokens


def make(dtype: torch.dtype, heads: tuple[int, ...], head_dim: int, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(NUM_SLOTS, head, head_dim).to(dtype).to(device) for head in heads]


# rows of whole words, of odd bytes, of more words than a program moves at a time, and of different widths
SHAPES = [((2, 2), 8), ((1, 1), 3), ((3, 3, 3), 260), ((2, 1, 4), 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), SHAPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "first"), [(24, 0), (1, 23), (9, 0), (8, 5), (0, 3)])
def test_matches_reference(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, ...],
    head_dim: int,
    num_tokens: int,
    first: int,
) -> None:
    """A word dropped at the end of a row, a neighbour's row, a layer in another's place, or a row past the last."""
    gather, scatter = functions(backend)
    buffers = make(dtype, heads, head_dim, device)
    pool = KvBuffers(buffers)
    slots = torch.randperm(NUM_SLOTS, device=device)[:num_tokens]
    for indices in (slots, slots.int()):
        memory = torch.full((NUM_ROWS, pool.width), 7, dtype=dtype, device=device)
        expected = memory.clone()
        gather(pool, indices, memory[first : first + num_tokens])
        gather_tokens_reference(pool, slots, expected[first : first + num_tokens])
        assert torch.equal(memory, expected)
        targets = make(dtype, heads, head_dim, device)
        wanted = [target.clone() for target in targets]
        scatter(KvBuffers(targets), indices, memory[first : first + num_tokens])
        scatter_tokens_reference(KvBuffers(wanted), slots, memory[first : first + num_tokens])
        for target, want in zip(targets, wanted, strict=True):
            assert torch.equal(target, want)


def test_rejects_wrong_arguments() -> None:
    """Rows of another pool would be read as if they fitted."""
    buffers = make(torch.float32, (2, 2), 4, torch.device("cpu"))
    pool, slots = KvBuffers(buffers), torch.arange(5)
    rows = torch.zeros(5, 16)
    for call in (gather_tokens, scatter_tokens):
        for wrong in (rows[1:], rows[:, 1:], rows.flatten()):
            with pytest.raises(ValueError, match="rows: expected shape"):
                call(pool, slots, wrong)
        with pytest.raises(ValueError, match="rows: expected contiguous rows"):
            call(pool, slots, torch.zeros(16, 5).T)
        with pytest.raises(ValueError, match="rows: expected dtype"):
            call(pool, slots, rows.half())
        with pytest.raises(ValueError, match="slots: expected dtype"):
            call(pool, slots.float(), rows)


def test_rejects_wrong_buffers() -> None:
    """The kernel takes addresses: a buffer with gaps, or of another type, would be read as something else."""
    one, two = make(torch.float32, (2, 2), 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="buffers: expected at least one"):
        KvBuffers([])
    with pytest.raises(ValueError, match=r"buffers\[1\]: expected contiguous rows"):
        KvBuffers([one, two[:, :1]])
    with pytest.raises(ValueError, match=r"buffers\[1\]: expected dtype"):
        KvBuffers([one, two.half()])


def test_table_of_addresses() -> None:
    """Words larger than a row's or an address's own would move a neighbour's bytes."""
    memory = torch.zeros(200, dtype=torch.bfloat16)
    for offset, width, word in ((0, 12, 8), (0, 6, 4), (2, 12, 4), (1, 12, 2), (0, 3, 2)):
        buffers = [memory[offset : offset + 5 * width].view(5, width), torch.zeros(5, 8, dtype=torch.bfloat16)]
        pool = KvBuffers(buffers)
        assert pool.word_bytes == word
        table = pool.table(2)
        assert table.tolist() == [[b.data_ptr() for b in buffers], [width, 8], [0, width]]
        assert pool.table(2) is table
