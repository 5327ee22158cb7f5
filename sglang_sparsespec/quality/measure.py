"""A setting against the dense model: the same texts, the same rounds, nothing left out."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.acceptance.measure import standard_error
from sglang_sparsespec.quality.walk import Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.needles import Haystack
    from sglang_sparsespec.quality.settings import Setting
    from sglang_sparsespec.quality.walk import Requests


@dataclass(frozen=True)
class Workload:
    """What all settings of one k are measured on. Texts and haystacks have their prompts in the pool."""

    texts: Requests
    ahead: torch.Tensor
    """[R, T + 1], int64: what stands behind each prompt; the last one is only predicted."""
    haystacks: Requests | None
    hidden: Sequence[Haystack]
    own_tokens: int
    """To be written greedily behind each prompt."""


@dataclass(frozen=True)
class Baseline:
    """What the dense model says about a workload."""

    logits: list[torch.Tensor]
    """By round: [R, tokens, vocab_size], float32."""
    written: torch.Tensor
    """[R, own_tokens], int64."""


@dataclass(frozen=True)
class Quality:
    """One setting. Lists are by text unless said otherwise; nats."""

    setting: Setting
    kl: list[float]
    """Mean over positions of KL(dense || sparse)."""
    kl_by_round: list[float]
    """By round, mean over texts."""
    agreement: list[float]
    """Share of positions with the dense model's argmax."""
    nll: list[float]
    """Of the text's tokens."""
    dense_nll: list[float]
    equal_prefix: list[int]
    """Tokens of greedy output before the first that differs from dense greedy output; the first is the prefill's."""
    own_tokens: int
    recalled: list[float]
    """By haystack: share of lines recalled; empty without haystacks."""
    read_share: float
    """Share of the committed KV that a verify reads."""
    channels_kept: float
    experts_kept: float
    seconds: float

    @property
    def nll_excess(self) -> list[float]:
        """By text: what leaving out costs; the perplexity grows by a factor of its exponential."""
        return [mine - dense for mine, dense in zip(self.nll, self.dense_nll, strict=True)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over texts (NaN for a single one)."""
    return statistics.fmean(values), standard_error(values)


def baseline(model: PagedModel, setting: Setting, work: Workload) -> Baseline:
    """Of a dense setting; its rounds are those of every setting with the same k."""
    logits = list(Verifier(model, setting).along(work.texts, work.ahead[:, :-1]))
    return Baseline(logits, Verifier(model, setting).write(work.texts, work.own_tokens))


def measure(model: PagedModel, setting: Setting, work: Workload, base: Baseline) -> Quality:
    started = time.monotonic()
    verifier = Verifier(model, setting)
    kl, agreement, nll, dense_nll = ([] for _ in range(4))
    fed = 0
    for logits, dense_logits in zip(verifier.along(work.texts, work.ahead[:, :-1]), base.logits, strict=True):
        targets = work.ahead[:, fed + 1 : fed + 1 + logits.shape[1], None]
        fed += logits.shape[1]
        mine, dense = torch.log_softmax(logits, -1), torch.log_softmax(dense_logits, -1)
        kl.append((dense.exp() * (dense - mine)).sum(-1))
        agreement.append((logits.argmax(-1) == dense_logits.argmax(-1)).double())
        nll.append(-mine.gather(-1, targets)[..., 0])
        dense_nll.append(-dense.gather(-1, targets)[..., 0])
    written = verifier.write(work.texts, work.own_tokens)
    prefix = (written == base.written).long().cumprod(1).sum(1)
    recalled = recall(model, setting, work) if work.haystacks is not None else []
    return Quality(
        setting=setting,
        kl=_by_text(kl),
        kl_by_round=[values.double().mean().item() for values in kl],
        agreement=_by_text(agreement),
        nll=_by_text(nll),
        dense_nll=_by_text(dense_nll),
        equal_prefix=prefix.tolist(),
        own_tokens=work.own_tokens,
        recalled=recalled,
        read_share=verifier.read_share,
        channels_kept=verifier.kept_share("channels"),
        experts_kept=verifier.kept_share("experts"),
        seconds=time.monotonic() - started,
    )


def _by_text(values: list[torch.Tensor]) -> list[float]:
    found: list[float] = torch.cat(values, dim=1).double().mean(1).tolist()
    return found


def recall(model: PagedModel, setting: Setting, work: Workload) -> list[float]:
    """By haystack: share of lines of which every digit is the model's argmax.

    Rounds of a line begin at another place of it each time, as they do in a server.
    """
    assert work.haystacks is not None
    num_lines = len(work.hidden[0].lines)
    right = torch.zeros(len(work.hidden), num_lines)
    for number in range(num_lines):
        lines = [stack.lines[number] for stack in work.hidden]
        longest = max(map(len, lines))
        # what pads a line stands behind it and is not looked at
        text = torch.tensor([line + line[-1:] * (longest - len(line)) for line in lines], device=model.device)
        first = 1 + number % (setting.num_steps + 1)
        rounds = Verifier(model, setting).along(work.haystacks, text, first=first)
        predicted = torch.cat([logits.argmax(-1) for logits in rounds], dim=1)
        for row, stack in enumerate(work.hidden):
            answer = stack.answers[number]
            before = slice(answer.start - 1, answer.stop - 1)
            right[row, number] = torch.equal(predicted[row, before], text[row, answer.start : answer.stop])
    found: list[float] = right.double().mean(1).tolist()
    return found
