"""The patch of the host's logits processor: who gets logits in the model's dtype, and who does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.adapter

NUM_ROWS, VOCAB, PADDED = 3, 10, 16


def copied(
    logits: torch.Tensor, buffer: torch.Tensor | None, *, cap: float | None = None, use_buffer: bool = True
) -> torch.Tensor:
    """`_copy_logits_to_buffer` as SGLang calls it, patched."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang_sparsespec.patches.logits import keep_the_models_dtype

    original: Any = LogitsProcessor._copy_logits_to_buffer
    original = getattr(original, "__wrapped__", original)
    processor: Any = SimpleNamespace(vocab_size=VOCAB, final_logit_softcapping=cap)
    metadata: Any = SimpleNamespace(next_token_logits_buffer=buffer)
    return keep_the_models_dtype(original, processor, logits, metadata, use_buffer=use_buffer)


@pytest.fixture
def logits() -> torch.Tensor:
    """As a head with a padded vocabulary computes them."""
    return torch.randn(NUM_ROWS, PADDED).bfloat16()


def test_a_narrow_buffer_takes_the_logits_as_they_are(logits: torch.Tensor) -> None:
    """A CUDA graph's logits must lie in the buffer, and float32 would double what they take."""
    buffer = torch.zeros(NUM_ROWS, VOCAB, dtype=torch.bfloat16)
    result = copied(logits, buffer)
    assert result is buffer
    assert torch.equal(buffer, logits[:, :VOCAB])
    # widening is exact and keeps ties where they are
    assert torch.equal(result.argmax(dim=-1), result.float().argmax(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_empty_narrow_buffer_leaves_logits_where_they_are(logits: torch.Tensor, dtype: torch.dtype) -> None:
    """An eager forward needs no copy at all; a float32 head keeps float32."""
    logits = logits.to(dtype)
    result = copied(logits, torch.zeros(0, VOCAB, dtype=torch.bfloat16))
    assert result.data_ptr() == logits.data_ptr()
    assert result.dtype == dtype
    assert result.shape == (NUM_ROWS, VOCAB)


def test_a_model_that_caps_its_logits_gets_float32(logits: torch.Tensor) -> None:
    """tanh of narrow logits would merge neighbours that SGLang tells apart."""
    for buffer in (torch.zeros(NUM_ROWS, VOCAB, dtype=torch.bfloat16), torch.zeros(0, VOCAB, dtype=torch.bfloat16)):
        result = copied(logits, buffer, cap=30.0)
        assert result.dtype == torch.float32
        assert torch.equal(result, logits[:, :VOCAB].float())


@pytest.mark.parametrize("use_buffer", [True, False])
@pytest.mark.parametrize("rows", [None, NUM_ROWS, 0])
def test_sglangs_own_calls_are_not_changed(logits: torch.Tensor, rows: int | None, use_buffer: bool) -> None:
    """A prefill's sampler, and its logprobs, take float32."""
    buffer = None if rows is None else torch.zeros(rows, VOCAB)
    result = copied(logits, buffer, use_buffer=use_buffer)
    assert result.dtype == torch.float32
    assert torch.equal(result, logits[:, :VOCAB].float())
    assert (result is buffer) == (rows == NUM_ROWS and use_buffer)
    assert copied(logits, torch.zeros(0, VOCAB, dtype=torch.bfloat16), use_buffer=False).dtype == torch.float32
