"""Rounds of sparse verifies: along a given text, and along what the model writes.

KV is written by the sparse verifies themselves, so that errors add up as in a server. Prompts are prefilled dense.
Drafts are taken to be all right, so each round has k + 1 tokens: the longest reuse of the first token's blocks.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.quality.rounds import VerifyRound
from sglang_sparsespec.quality.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.settings import Setting


@dataclass(frozen=True)
class Requests:
    """Requests whose prompts are in the pool, in neighbouring rows; what every setting starts from."""

    rows: range
    lens: torch.Tensor
    """[R], int64: prompt tokens."""
    next_tokens: torch.Tensor
    """[R], int64: the argmax behind the prompt, of the dense prefill."""


@dataclass
class Verifier:
    """The rounds of one setting, and what they did without."""

    model: PagedModel
    setting: Setting
    read_shares: list[float] = field(default_factory=list)
    """By round: share of the committed KV that was read."""
    dense_rounds: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choosing_layers = self.setting.choosing_layers(self.model)
        self.rules = Rules(self.model, self.setting)

    def along(self, requests: Requests, text: torch.Tensor, *, first: int | None = None) -> Iterator[torch.Tensor]:
        """Feed text [R, T] behind the prompts in rounds of k + 1 tokens, the first of `first` tokens if given.

        Yields:
            Logits of each round, [R, tokens of the round, vocab_size], float32.
        """
        width = self.setting.num_steps + 1
        start, stop, number = 0, first or width, 1
        while start < text.shape[1]:
            tokens = text[:, start:stop]
            positions = requests.lens[:, None] + torch.arange(start, start + tokens.shape[1], device=text.device)
            verify, is_dense = self._round(requests, requests.lens + start, number)
            with nullcontext() if is_dense else self.rules:
                yield verify.feed(tokens, positions)
            self._note(verify, is_dense)
            start, stop, number = stop, stop + width, number + 1

    def write(self, requests: Requests, num_tokens: int) -> torch.Tensor:
        """Greedy output behind the prompts, [R, num_tokens]; the prefill's token comes first and counts."""
        width = self.setting.num_steps + 1
        written = [requests.next_tokens]
        while len(written) < num_tokens:
            done = len(written) - 1
            verify, is_dense = self._round(requests, requests.lens + done, done // width + 1)
            for _ in range(min(width, num_tokens - len(written))):
                positions = (requests.lens + len(written) - 1)[:, None]
                with nullcontext() if is_dense else self.rules:
                    logits = verify.feed(written[-1][:, None], positions)
                written.append(logits[:, -1].argmax(-1))
            self._note(verify, is_dense)
        return torch.stack(written, dim=1)

    def _round(self, requests: Requests, committed_lens: torch.Tensor, number: int) -> tuple[VerifyRound, bool]:
        setting = self.setting
        is_dense = setting.is_dense or (setting.dense_every > 0 and number % setting.dense_every == 0)
        verify = VerifyRound(
            self.model,
            requests.rows,
            committed_lens,
            self.choosing_layers,
            ratio=1.0 if is_dense else setting.attention_ratio,
            dense_below=setting.dense_below,
            block_size=setting.block_size,
        )
        return verify, is_dense

    def _note(self, verify: VerifyRound, is_dense: bool) -> None:
        self.read_shares.append(verify.read_share())
        self.dense_rounds.append(is_dense)

    @property
    def read_share(self) -> float:
        """Mean over rounds."""
        return statistics.fmean(self.read_shares)

    def kept_share(self, what: str) -> float:
        """Share of `channels` or `experts` that rounds used, dense rounds counted as all of them."""
        dense = statistics.fmean(self.dense_rounds)
        return dense + (1.0 - dense) * self.rules.kept_share(what)
