"""Rows of the KV pool into a block and back: every element where it belongs, and no other touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sglang_sparsespec.ops.kv_blocks import BlockLayout, gather_block, scatter_block
from sglang_sparsespec.ops.kv_blocks.reference import gather_block_reference, scatter_block_reference

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SLOTS, BLOCK_TOKENS = 50, 24


def functions(backend: str) -> tuple[Callable[..., None], Callable[..., None]]:
    if backend == "triton":
        from sglang_sparsespec.ops.kv_blocks.triton_impl import gather_block_triton, scatter_block_triton

        return gather_block_triton, scatter_block_triton
    if backend == "torch-cuda":
        from sglang_sparsespec.ops.kv_blocks.torch_impl import gather_block_torch, scatter_block_torch

        return gather_block_torch, scatter_block_torch
    return gather_block, scatter_block


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
    layout = BlockLayout(tuple(head * head_dim for head in heads), BLOCK_TOKENS)
    slots = torch.randperm(NUM_SLOTS, device=device)[:num_tokens]
    for indices in (slots, slots.int()):
        block = torch.full((layout.numel,), 7, dtype=dtype, device=device)
        expected = block.clone()
        gather(buffers, indices, block, layout, first)
        gather_block_reference(buffers, slots, expected, layout, first)
        assert torch.equal(block, expected)
        targets = make(dtype, heads, head_dim, device)
        wanted = [target.clone() for target in targets]
        scatter(targets, indices, block, layout, first)
        scatter_block_reference(wanted, slots, block, layout, first)
        for target, want in zip(targets, wanted, strict=True):
            assert torch.equal(target, want)


def test_rejects_wrong_arguments() -> None:
    """A block of another pool would be read as if it fitted."""
    buffers = make(torch.float32, (2, 2), 4, torch.device("cpu"))
    layout, slots = BlockLayout((8, 8), BLOCK_TOKENS), torch.arange(5)
    block = torch.zeros(layout.numel)
    for call in (gather_block, scatter_block):
        with pytest.raises(ValueError, match="block: expected shape"):
            call(buffers, slots, block[1:], layout)
        with pytest.raises(ValueError, match="buffers: expected 2"):
            call(buffers[:1], slots, block, layout)
        with pytest.raises(ValueError, match=r"buffers\[1\]: expected contiguous rows of 8"):
            call([buffers[0], buffers[1][:, :1]], slots, block, layout)
        with pytest.raises(ValueError, match=r"buffers\[0\]: expected dtype"):
            call([buffer.half() for buffer in buffers], slots, block, layout)
        with pytest.raises(ValueError, match="first: 5 tokens from row 20 do not fit 24 rows"):
            call(buffers, slots, block, layout, 20)
        with pytest.raises(ValueError, match="slots: expected dtype"):
            call(buffers, slots.float(), block, layout)
