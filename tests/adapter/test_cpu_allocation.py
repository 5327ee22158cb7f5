"""The torch forms of SGLang's allocation kernels (patches/cpu_host.py) against the host's own naive code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

GARBAGE = -7


def _ceil(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    return (tokens + page_size - 1) // page_size


def _random_problem(page_size: int, num_reqs: int) -> dict[str, torch.Tensor]:
    """Requests at any offset in their last page; some ask for nothing, some for many pages."""
    prefix_lens = torch.randint(0, 4 * page_size + 1, (num_reqs,))
    extend_lens = torch.randint(0, 3 * page_size + 2, (num_reqs,))
    extend_lens[torch.rand(num_reqs) < 0.3] = 0
    seq_lens = prefix_lens + extend_lens
    pages = torch.randperm(1000) + 1
    # the slot of the last prefix token: anywhere in a page that nobody else has
    last_page = pages[:num_reqs]
    last_loc = torch.where(prefix_lens > 0, last_page * page_size + (prefix_lens - 1) % page_size, -1)
    num_new = int((_ceil(seq_lens, page_size) - _ceil(prefix_lens, page_size)).sum())
    free_pages = pages[num_reqs : num_reqs + num_new + 3]
    return {"prefix_lens": prefix_lens, "seq_lens": seq_lens, "last_loc": last_loc, "free_pages": free_pages}


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_alloc_extend_equals_the_hosts_naive_form(page_size: int, dtype: torch.dtype) -> None:
    """A slot given twice, or taken from the wrong end of a page, corrupts another request's KV."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
    from sglang_sparsespec.patches.cpu_host import alloc_extend

    for num_reqs in (1, 2, 3, 8, 33) * 4:
        problem = _random_problem(page_size, num_reqs)
        total = int((problem["seq_lens"] - problem["prefix_lens"]).sum())
        actual = torch.full((total,), GARBAGE)
        lens = (problem["prefix_lens"].to(dtype), problem["seq_lens"].to(dtype), problem["last_loc"].to(dtype))
        before = problem["free_pages"].clone()
        alloc_extend(*lens, problem["free_pages"], actual, 64, page_size)
        expected = torch.full((total,), GARBAGE)
        alloc_extend_naive(**problem, out_indices=expected, page_size=page_size, device="cpu")
        assert torch.equal(actual, expected)
        assert torch.equal(problem["free_pages"], before)
        assert len(set(actual.tolist())) == total


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_alloc_decode_is_an_extend_by_one(page_size: int) -> None:
    """The kernel's `seq_lens` already counts the new token; one too many would skip a slot in every page."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive
    from sglang_sparsespec.patches.cpu_host import alloc_decode

    for num_reqs in (1, 2, 7, 32) * 4:
        problem = _random_problem(page_size, num_reqs)
        problem["prefix_lens"] = problem["prefix_lens"].clamp(min=1)
        problem["seq_lens"] = problem["prefix_lens"] + 1
        problem["last_loc"] = torch.arange(num_reqs) * 64 * page_size + (problem["prefix_lens"] - 1) % page_size
        problem["free_pages"] = torch.randperm(100) + 5000
        actual = torch.full((num_reqs,), GARBAGE)
        alloc_decode(problem["seq_lens"], problem["last_loc"], problem["free_pages"], actual, 32, page_size)
        expected = torch.full((num_reqs,), GARBAGE)
        alloc_extend_naive(**problem, out_indices=expected, page_size=page_size, device="cpu")
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_free", [0, 1, 2])
def test_alloc_extend_survives_exhausted_pages(num_free: int) -> None:
    """The allocator notices a shortage only after the kernel ran: an IndexError there would take the server down."""
    from sglang_sparsespec.patches.cpu_host import alloc_extend

    out = torch.full((100,), GARBAGE)
    lens = torch.tensor([0, 8]), torch.tensor([60, 48]), torch.tensor([-1, 87])
    alloc_extend(*lens, torch.arange(num_free) + 1, out, 2, 16)
    # the rest of the second request's last page is still right
    assert out[60:68].tolist() == list(range(88, 96))


@pytest.mark.parametrize("page_size", [4, 16])
def test_the_hosts_allocator_refuses_when_pages_run_out(page_size: int) -> None:
    """The whole path: the allocator of this process, with our kernels in it, says None and keeps its free list."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from sglang_sparsespec.adapter.registration import is_plain_cpu_host

    if not is_plain_cpu_host():
        pytest.skip("the patches of scope cpu are in force on a machine without an accelerator only")
    allocator = PagedTokenToKVPoolAllocator(
        8 * page_size, page_size, torch.float32, "cpu", kvcache=None, need_sort=False
    )

    def extend(prefix: int, total: int, last: int) -> torch.Tensor | None:
        lens = torch.tensor([prefix]), torch.tensor([total])
        return allocator.alloc_extend(
            prefix_lens=lens[0],
            prefix_lens_cpu=lens[0],
            seq_lens=lens[1],
            seq_lens_cpu=lens[1],
            last_loc=torch.tensor([last]),
            extend_num_tokens=total - prefix,
        )

    slots = extend(0, 5 * page_size + 1, -1)
    assert slots is not None
    assert len(set(slots.tolist())) == 5 * page_size + 1
    free = allocator.free_pages.clone()
    assert extend(0, 3 * page_size, -1) is None
    assert torch.equal(allocator.free_pages, free)
    more = extend(5 * page_size + 1, 6 * page_size, int(slots[-1]))
    assert more is not None
    assert more.tolist() == [int(slots[-1]) + 1 + i for i in range(page_size - 1)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_assign_req_to_token_pool_writes_each_row_its_share(dtype: torch.dtype) -> None:
    """A share that starts at the wrong offset gives a request the slots of its neighbour."""
    from sglang_sparsespec.patches.cpu_host import assign_req_to_token_pool

    for num_reqs in (1, 2, 5, 12) * 5:
        pool = torch.full((16, 64), GARBAGE, dtype=torch.int32)
        rows = torch.randperm(16)[:num_reqs]
        start = torch.randint(0, 40, (num_reqs,))
        # zero counts, and counts past the kernel's block of 32
        counts = torch.randint(0, 24, (num_reqs,)) * (torch.rand(num_reqs) < 0.7)
        slots = torch.randperm(int(counts.sum()) + 5)
        expected = pool.clone()
        offset = 0
        for row, first, count in zip(rows.tolist(), start.tolist(), counts.tolist(), strict=True):
            for i in range(count):
                expected[row, first + i] = slots[offset + i]
            offset += count
        end = (start + counts).to(dtype)
        assign_req_to_token_pool(rows, pool, start.to(dtype), end, slots, pool.shape[1], 16)
        assert torch.equal(pool, expected)


def test_kernels_are_launched_like_triton_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang writes `kernel[grid](...)`; a plain function in its place has no brackets."""
    from sglang.srt.mem_cache import allocation
    from sglang_sparsespec.patches import cpu_host

    monkeypatch.setattr(
        allocation, "assign_req_to_token_pool", cpu_host._TorchKernel(cpu_host.assign_req_to_token_pool)
    )
    monkeypatch.setattr(allocation, "_is_cpu", False)
    pool = torch.zeros(3, 8, dtype=torch.int32)
    allocation.assign_req_to_token_pool_func(
        torch.tensor([2]), pool, torch.tensor([1]), torch.tensor([4]), torch.tensor([7, 8, 9]), 1
    )
    assert pool[2].tolist() == [0, 7, 8, 9, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("module", "kernel", "ours"),
    [
        ("sglang.kernels.ops.memory.allocator", "alloc_extend_kernel", "alloc_extend"),
        ("sglang.kernels.ops.memory.allocator", "alloc_decode_kernel", "alloc_decode"),
        ("sglang.srt.mem_cache.allocation", "assign_req_to_token_pool", "assign_req_to_token_pool"),
    ],
)
def test_kernels_take_as_many_arguments_as_the_hosts(module: str, kernel: str, ours: str) -> None:
    """Arguments are positional: one that SGLang inserts would shift the others without an error."""
    from sglang_sparsespec.patches import cpu_host

    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    [definition] = [
        node
        for node in ast.parse(Path(spec.origin).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == kernel
    ]
    host = [_plain(argument.arg) for argument in definition.args.args]
    function: Callable[..., Any] = getattr(cpu_host, ours)
    assert [_plain(name) for name in inspect.signature(function).parameters] == host


def _plain(name: str) -> str:
    """The host writes pre_lens_ptr and free_page_ptr where we write prefix_lens and free_pages."""
    name = name.removesuffix("_ptr")
    return {"pre_lens": "prefix_lens", "free_page": "free_pages"}.get(name, name)
