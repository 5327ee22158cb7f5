"""sparse_decode against its reference; the inputs of kv_cases.py make every out-of-contract read visible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from kv_cases import DTYPES, ListedCase, assert_output_close, make_listed_case, skip_unless_interpretable

from sglang_sparsespec.ops.sparse_decode import sparse_decode
from sglang_sparsespec.ops.sparse_decode.reference import sparse_decode_reference
from sglang_sparsespec.ops.sparse_decode.torch_impl import sparse_decode_torch

if TYPE_CHECKING:
    from collections.abc import Callable

# empty, one entry, off and on the tiles of 32 and 64
KV_LENS = [0, 1, 31, 32, 33, 63, 64, 65, 100]


def implementation(backend: str) -> Callable[..., torch.Tensor]:
    if backend == "triton":
        from sglang_sparsespec.ops.sparse_decode.triton_impl import sparse_decode_triton

        return sparse_decode_triton
    return sparse_decode if backend == "cpu" else sparse_decode_torch


def check(backend: str, device: torch.device, case: ListedCase, **options: Any) -> None:
    scale = case.q.shape[-1] ** -0.5
    on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
    actual = implementation(backend)(*case.to(device), scale=scale, **on_device)
    options.pop("num_splits", None)
    expected = sparse_decode_reference(*case, scale=scale, **options)
    assert actual.dtype == case.q.dtype
    assert_output_close(actual.cpu(), expected)
    assert (actual.cpu()[case.kv_lens == 0] == 0).all()


@pytest.mark.parametrize("is_shared", [False, True], ids=["per-head", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_over_ragged_lengths(
    backend: str, device: torch.device, dtype: torch.dtype, is_shared: bool
) -> None:
    """A length off by one, a read of garbage or of slot 0, or a list of the wrong head would pass without it."""
    skip_unless_interpretable(backend, device, dtype)
    case = make_listed_case(KV_LENS, width=100, num_kv_heads=3, group=3, head_dim=64, dtype=dtype, is_shared=is_shared)
    check(backend, device, case)


@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (4, 80), (8, 96), (16, 128), (5, 256)], ids=lambda value: str(value)
)
def test_matches_reference_for_each_head_shape(backend: str, device: torch.device, group: int, head_dim: int) -> None:
    """Padding of the group or of the head dim that leaks into sums or stores would pass; other pairs are between."""
    case = make_listed_case(
        [7, 40, 0], width=40, num_kv_heads=2, group=group, head_dim=head_dim, dtype=torch.float16, seed=1
    )
    check(backend, device, case)


@pytest.mark.parametrize("layout", ["interleaved", "padded"])
def test_reads_strided_pools(backend: str, device: torch.device, layout: str) -> None:
    """Taking the pool for contiguous would pass: a slot stride of H * D, or a head stride of D."""
    case = make_listed_case([5, 20], width=20, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32, layout=layout)
    if device.type == "cpu":
        assert not case.k_cache.is_contiguous()
    check(backend, device, case)


def test_caps_logits(backend: str, device: torch.device) -> None:
    """A cap before the scale, or none, would pass; the cap of 0.5 bends logits of size 1 strongly."""
    case = make_listed_case([0, 9, 33], width=33, num_kv_heads=2, group=3, head_dim=64, dtype=torch.float32)
    check(backend, device, case, logit_cap=0.5)


@pytest.mark.parametrize("is_shared", [False, True], ids=["per-head", "shared"])
def test_reads_the_rows_that_it_is_told(backend: str, device: torch.device, is_shared: bool) -> None:
    """Lists of more requests than are asked about, in another order, one of them twice: lengths go with the queries."""
    case = make_listed_case(
        [33, 7, 0, 64], width=64, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32, is_shared=is_shared
    )
    case = case._replace(kv_lens=torch.tensor([7, 33, 5, 0], dtype=torch.int32))
    check(backend, device, case, kv_rows=torch.tensor([1, 0, 1, 3]))
    few = case._replace(q=case.q[:1], kv_lens=case.kv_lens[:1])
    check(backend, device, few, kv_rows=torch.tensor([3], dtype=torch.int32))


@pytest.mark.only_backend("triton")
@pytest.mark.parametrize("num_splits", [1, 2, 8])
def test_splits_merge_to_the_same_result(backend: str, device: torch.device, num_splits: int) -> None:
    """A share that is empty, or weighed wrongly in the reduction, would pass where the launcher picks one split."""
    case = make_listed_case([0, 1, 64, 65, 130], width=130, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float16)
    check(backend, device, case, num_splits=num_splits)


def test_writes_into_out(backend: str, device: torch.device) -> None:
    """Ignoring `out`, its strides, or its old content in a row of length 0 would pass."""
    case = make_listed_case([0, 3, 10], width=10, num_kv_heads=1, group=4, head_dim=64, dtype=torch.float32).to(device)
    wide = torch.full((3, 6, 64), torch.nan, device=device)
    out = wide[:, 1:5]
    result = implementation(backend)(*case, scale=0.125, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert_output_close(out, sparse_decode_reference(*case, scale=0.125))
    assert wide[:, [0, 5]].isnan().all()


def test_no_requests_and_no_width(backend: str, device: torch.device) -> None:
    """A launch over an empty grid, or a maximum over nothing, would pass."""
    case = make_listed_case([0, 0], width=0, num_kv_heads=1, group=2, head_dim=64, dtype=torch.float32).to(device)
    assert (implementation(backend)(*case, scale=1.0) == 0).all()
    none = ListedCase(case.q[:0], case.k_cache, case.v_cache, case.kv_slots[:0], case.kv_lens[:0])
    assert implementation(backend)(*none, scale=1.0).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda case: case._replace(q=case.q[0])),
        ("k_cache", lambda case: case._replace(k_cache=case.k_cache.half())),
        ("k_cache", lambda case: case._replace(k_cache=case.k_cache.transpose(0, 2).contiguous().transpose(0, 2))),
        ("v_cache", lambda case: case._replace(v_cache=case.v_cache[:-1])),
        ("kv_slots", lambda case: case._replace(kv_slots=case.kv_slots.repeat(1, 3, 1))),
        ("kv_slots", lambda case: case._replace(kv_slots=case.kv_slots.float())),
        ("kv_lens", lambda case: case._replace(kv_lens=case.kv_lens[:1])),
        ("kv_slots", lambda case: case._replace(kv_slots=case.kv_slots[:1])),
    ],
    ids=["q-rank", "k-dtype", "k-stride", "v-shape", "lists", "slot-dtype", "lens-shape", "no-rows"],
)
def test_rejects_wrong_arguments(name: str, change: Callable[[ListedCase], ListedCase]) -> None:
    """A mistake of the caller would otherwise surface as a wrong address in a kernel."""
    case = make_listed_case([2, 3], width=3, num_kv_heads=2, group=2, head_dim=64, dtype=torch.float32)
    with pytest.raises(ValueError, match=name):
        sparse_decode(*change(case), scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_function_matches_reference_at_size(dtype: torch.dtype) -> None:
    """Dispatch to the kernel and its own choice of splits would go untested."""
    case = make_listed_case(
        [0, 1, 2000, 4097, 333], width=4100, num_kv_heads=8, group=4, head_dim=128, dtype=dtype, seed=2
    ).to(torch.device("cuda"))
    actual = sparse_decode(*case, scale=128**-0.5)
    assert_output_close(actual, sparse_decode_reference(*case, scale=128**-0.5))


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths() -> None:
    """A length or grid fixed at capture would pass every eager test."""
    case = make_listed_case(
        [5, 600, 0], width=600, num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16, is_shared=True
    ).to(torch.device("cuda"))
    sparse_decode(*case, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_decode(*case, scale=0.1)
    case.kv_lens.copy_(torch.tensor([0, 17, 0]))
    graph.replay()
    assert_output_close(out, sparse_decode_reference(*case, scale=0.1))


@pytest.mark.gpu
def test_addresses_past_two_gib() -> None:
    """Address arithmetic in 32 bits would pass on every small pool."""
    num_slots = 2**31 // (8 * 128) + 1000
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    k_cache = torch.zeros(num_slots, 8, 128, dtype=torch.bfloat16, device="cuda")
    v_cache = torch.zeros_like(k_cache)
    slots = torch.arange(num_slots - 900, num_slots, dtype=torch.int32, device="cuda").view(1, 1, -1)
    k_cache[-900:].normal_()
    v_cache[-900:].normal_()
    q = torch.randn(1, 32, 128, dtype=torch.bfloat16, device="cuda")
    kv_lens = torch.tensor([900], dtype=torch.int32, device="cuda")
    actual = sparse_decode(q, k_cache, v_cache, slots, kv_lens, scale=0.1)
    assert_output_close(actual, sparse_decode_reference(q, k_cache, v_cache, slots, kv_lens, scale=0.1))
