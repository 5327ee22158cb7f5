"""Next-token logits of a checkpoint by an independent implementation: transformers, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Teacher:
    """The model at `path`, asked for the logits that follow given tokens."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    def next_logits(self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
        """[len(continuations), vocab_size]: what follows the prompt and each continuation; all of one length."""
        with torch.inference_mode():
            tokens = torch.tensor([[*prompt, *continuation] for continuation in continuations])
            return self._model(tokens).logits[:, -1].float()

    def forced_logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """[len(output), vocab_size]: the logits from which each token of `output` was chosen."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output]])).logits[0].float()
        return logits[len(prompt) - 1 : -1]
