"""The exact best positions for every draft step: a bound on what selection can reach, not a way to serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sglang_sparsespec.ops.score_capture import capture_scores
from sglang_sparsespec.selection.step import StepPolicy

if TYPE_CHECKING:
    from sglang_sparsespec.selection.step import LayerKeys


class OraclePolicy(StepPolicy):
    """Attention probabilities of the draft step's own query over all keys, averaged over the GQA group.

    Reads every key in every layer of every draft step, so it can save nothing.
    """

    name: ClassVar[str] = "oracle"
    caution: ClassVar[str | None] = (
        "every draft step reads the keys of the whole context; for analysis only, slower than no speculation"
    )

    def score(
        self,
        query: torch.Tensor,
        query_positions: torch.Tensor,
        keys: LayerKeys,
        prepared: torch.Tensor | None,
    ) -> torch.Tensor:
        return capture_scores(
            query[:, None],
            keys.k_cache,
            keys.req_to_token,
            keys.rows,
            query_positions,
            torch.ones_like(query_positions),
            keys.kv_lens,
            scale=keys.scale,
            max_len=keys.max_len,
            logit_cap=keys.logit_cap,
        )
