"""The two inputs of a round in SGLang's types: what travels between rounds, and what a verify is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


@dataclass
class SparseSpecDraftInput(SpecInput):
    """What the next round needs of the last one: a bonus token per request.

    Under the overlap scheduler the token itself waits on the device in the FutureMap and `future_indices` names its
    row; `bonus_tokens` is filled from there when the round starts. The other fields are read by SGLang's relay.
    """

    bonus_tokens: torch.Tensor
    """[num_reqs], int64."""
    topk_p: torch.Tensor | None = None
    topk_index: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    future_indices: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__(spec_input_type=SpecInputType.EAGLE_DRAFT)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None) -> None:
        """Keep the requests at `new_indices` (int64)."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
        else:
            self.bonus_tokens = self.bonus_tokens[new_indices]

    def merge_batch(self, spec_info: SparseSpecDraftInput) -> None:
        """Append the requests of another batch."""
        if self.future_indices is not None:
            assert spec_info.future_indices is not None, "one batch is relayed, the other is not"
            self.future_indices = torch.cat([self.future_indices, spec_info.future_indices])
        else:
            self.bonus_tokens = torch.cat([self.bonus_tokens, spec_info.bonus_tokens])


@dataclass
class SparseSpecDraftStep(SpecInput):
    """Marks a forward as a draft step; the sparse plan itself lives in the attention backend."""

    positions: torch.Tensor
    """[num_tokens], int64: of the tokens that are fed."""

    def __post_init__(self) -> None:
        super().__init__(spec_input_type=SpecInputType.EAGLE_DRAFT)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1


class SparseSpecMixedStep(SparseSpecDraftStep):
    """Marks a forward in which some requests draft and others verify; who does, lives in the attention backend."""


@dataclass
class SparseSpecVerifyInput(DFlashVerifyInput):
    """A chain of k + 1 tokens per request under the ordinary causal mask.

    DFlash's verify is the host's only linear one; its FlashInfer metadata serves ours unchanged.
    """

    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL
    max_committed_len: int = 0
    """Bound of the committed lengths in the batch, known to the host."""
    is_fused: bool = False
    """Attention, scores and selection come out of our own kernel, which is planned apart; the rest is not read."""
