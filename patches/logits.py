"""Logits in the dtype that the model computed them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang_sparsespec.patches.ledger import Patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor


def keep_the_models_dtype(
    copy_logits: Callable[..., torch.Tensor],
    processor: LogitsProcessor,
    logits: torch.Tensor,
    logits_metadata: LogitsMetadata,
    use_buffer: bool = True,
) -> torch.Tensor:
    """AROUND hook: a buffer that is not float32, which SGLang never passes, asks for logits that are not widened.

    They come back in the buffer if its shape and dtype are theirs, otherwise as they are: an empty buffer saves the
    copy. A model that caps its logits caps them in float32.
    """
    buffer = logits_metadata.next_token_logits_buffer if use_buffer else None
    if buffer is None or buffer.dtype == torch.float32:
        return copy_logits(processor, logits, logits_metadata, use_buffer=use_buffer)
    logits = logits[:, : processor.vocab_size]
    if processor.final_logit_softcapping:
        return logits.float()
    if buffer.shape != logits.shape or buffer.dtype != logits.dtype:
        return logits
    return buffer.copy_(logits)


PATCHES = (
    Patch(
        target="sglang.srt.layers.logits_processor.LogitsProcessor._copy_logits_to_buffer",
        why="SGLang widens all logits to float32: with 128 requests, 8 drafts and a 152K vocabulary 700 MB a verify, "
        "beside the 350 MB that the model computed.",
        how="Where the caller passes a buffer that is not float32, logits stay in the model's dtype.",
        upstream="Not reported yet; SGLang's samplers take float32 logits.",
        remove_when="LogitsProcessor accepts a next_token_logits_buffer in the dtype of the logits.",
        scope="sparsespec",
        kind="around",
        replacement=keep_the_models_dtype,
    ),
)
