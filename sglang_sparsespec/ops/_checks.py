"""Uniform argument checks of the ops; all read metadata only, so none of them waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Compare a shape; None stands for any size."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=False)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(shape)}.")


def check_dtype(name: str, tensor: torch.Tensor, expected: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in expected:
        wanted = " or ".join(str(e) for e in expected)
        raise ValueError(f"{name}: expected dtype {wanted}, got {tensor.dtype}.")


def check_device(name: str, tensor: torch.Tensor, expected: torch.device) -> None:
    if tensor.device != expected:
        raise ValueError(f"{name}: expected device {expected}, got {tensor.device}.")


def check_dense_rows(name: str, tensor: torch.Tensor) -> None:
    """The last dimension must be contiguous; the others may be strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last dimension of stride 1, got {tensor.stride(-1)}; call .contiguous().")


def check_index(name: str, tensor: torch.Tensor, expected: Sequence[int | None], device: torch.device) -> None:
    """A tensor of lengths, slots or row numbers."""
    check_shape(name, tensor, expected)
    check_dtype(name, tensor, INDEX_DTYPES)
    check_device(name, tensor, device)


def check_kv_pool(name: str, cache: torch.Tensor, q: torch.Tensor) -> int:
    """A pool [num_slots, H, D] that fits q [..., HQ, D]; returns H."""
    check_shape(name, cache, (None, None, q.shape[-1]))
    check_dtype(name, cache, (q.dtype,))
    check_device(name, cache, q.device)
    check_dense_rows(name, cache)
    num_kv_heads = cache.shape[1]
    if num_kv_heads == 0 or q.shape[-2] % num_kv_heads:
        raise ValueError(f"{name}: expected KV heads that divide the {q.shape[-2]} query heads, got {num_kv_heads}.")
    return num_kv_heads


def check_logit_cap(logit_cap: float) -> None:
    if not logit_cap >= 0.0:
        raise ValueError(f"logit_cap: expected 0 (off) or a positive number, got {logit_cap}.")


def check_paged_query(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    scale: float,
    max_len: int,
    logit_cap: float,
) -> None:
    """What paged_attention and capture_scores have in common."""
    check_shape("q", q, (None, None, None, None))
    check_dtype("q", q, FLOAT_DTYPES)
    check_dense_rows("q", q)
    check_kv_pool("k_cache", k_cache, q)
    check_index("req_to_token", req_to_token, (None, None), q.device)
    check_dense_rows("req_to_token", req_to_token)
    for name, tensor in (
        ("req_pool_indices", req_pool_indices),
        ("query_starts", query_starts),
        ("query_lens", query_lens),
    ):
        check_index(name, tensor, (q.shape[0],), q.device)
    if not 0 <= max_len <= req_to_token.shape[1]:
        raise ValueError(f"max_len: expected 0 to {req_to_token.shape[1]}, the width of req_to_token, got {max_len}.")
    # the kernel takes a row's maximum before it scales
    if not scale > 0.0:
        raise ValueError(f"scale: expected a factor above 0, got {scale}.")
    check_logit_cap(logit_cap)
