"""Rounds over texts. `forced`: along a given text. `own`: along what the model writes, as a server runs them.

In `forced` text every draft is the text's next token, the overlap of draft and target distribution is noted, and the
next round starts behind it. In `own` text drafts are drawn, accepted or rejected, and the model's output goes on.
Invariant: temperature 0 means argmax, on both sides.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.acceptance.rounds import Drafter
from sglang_sparsespec.acceptance.traces import Recorder
from sglang_sparsespec.speculation.acceptance import Acceptance, accept_chain, accept_greedy
from sglang_sparsespec.speculation.distribution import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.channels import ChannelShares
    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.acceptance.rounds import Prompts, RoundLogits
    from sglang_sparsespec.acceptance.settings import Setting
    from sglang_sparsespec.acceptance.traces import Trace


@dataclass(frozen=True)
class Measurement:
    """What one setting reached on some texts at one temperature."""

    setting: Setting
    text: str
    """`forced` or `own`."""
    temperature: float
    survival: list[list[float]]
    """By text: probability that draft j and all before it are correct, j = 1 .. k, mean over rounds."""
    accept_rates: list[float]
    """By draft position: probability that draft j is correct; in `own` text given that all before it are, and NaN for a
    position that no round reached."""
    rounds: list[int]
    """By text: verifies."""
    read_share: float
    """Mean over rounds of the share of the KV cache that a draft step selects."""
    seconds: float
    trace: Trace
    """The rounds behind all this, with the draft's own confidence."""
    channels: ChannelShares | None = None
    """Of feed-forward layers, that drafts went without; None without a threshold."""

    @property
    def accept_lengths(self) -> list[float]:
        """By text: tokens per verify, the bonus token counted; 1 to k + 1."""
        return [1.0 + sum(row) for row in self.survival]

    @property
    def accept_length(self) -> float:
        """Mean over texts, the bonus token counted."""
        return statistics.fmean(self.accept_lengths)

    @property
    def standard_error(self) -> float:
        """Of `accept_length`, over texts; NaN for a single one."""
        return standard_error(self.accept_lengths)

    @property
    def mean_survival(self) -> list[float]:
        """[k], mean over texts."""
        return [statistics.fmean(column) for column in zip(*self.survival, strict=True)]

    def gain_over(self, other: Measurement) -> tuple[float, float]:
        """Accept length minus the other's on the same texts, and the standard error of the difference."""
        pairs = zip(self.accept_lengths, other.accept_lengths, strict=True)
        differences = [mine - theirs for mine, theirs in pairs]
        return statistics.fmean(differences), standard_error(differences)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def overlap(drafts: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability that a draft from one distribution passes under the other: sum of min(p, q), or equal argmax.

    Args:
        drafts: [..., vocab_size], logits.
        target: likewise.

    Returns:
        [...], float32.
    """
    if temperature == 0:
        return (drafts.argmax(-1) == target.argmax(-1)).float()
    q, p = (torch.softmax(logits / temperature, dim=-1) for logits in (drafts, target))
    return torch.minimum(p, q).sum(-1)


def measure_forced(
    model: PagedModel,
    setting: Setting,
    prompts: Prompts,
    windows: list[list[int]],
    temperatures: Sequence[float],
    *,
    new_tokens: int,
) -> list[Measurement]:
    """All temperatures from one run: what is fed does not depend on them.

    Args:
        windows: by request: the prompt and at least `new_tokens` + 1 tokens more.
        new_tokens: of text that are walked, in whole rounds of k + 1.
    """
    started = time.monotonic()
    drafter = Drafter(model, setting, prompts)
    width = setting.config.num_draft_tokens
    num_rounds = max(1, new_tokens // width)
    rows = torch.arange(len(windows), device=model.device)
    # [num_reqs, num_rounds * width]: what stands behind the prompts
    ahead = torch.tensor(
        [
            window[length : length + num_rounds * width]
            for window, length in zip(windows, prompts.lens.tolist(), strict=True)
        ],
        device=model.device,
    )
    passed: dict[float, list[torch.Tensor]] = {temperature: [] for temperature in temperatures}
    recorders = {temperature: Recorder(temperature) for temperature in temperatures}
    shares = []
    for start in range(0, num_rounds * width, width):
        tokens = ahead[:, start : start + width]
        committed = prompts.lens + start
        shares += [setting.read_share(kv_len) for kv_len in committed.tolist()]
        logits = drafter.round(rows, committed, tokens[:, 0], lambda step, _, tokens=tokens: tokens[:, step + 1])  # type: ignore[misc]
        for temperature in temperatures:
            rates = overlap(logits.drafts, logits.target[:, :-1], temperature)
            passed[temperature].append(rates.cpu())
            recorders[temperature].add(rows, logits.drafts, rates.cumprod(dim=-1))
    seconds = time.monotonic() - started
    channels = drafter.channels.shares()
    return [
        Measurement(
            setting,
            "forced",
            temperature,
            # [num_rounds, num_reqs, k] -> by text
            torch.stack(by_round).cumprod(dim=-1).mean(dim=0).tolist(),
            torch.stack(by_round).mean(dim=(0, 1)).tolist(),
            [num_rounds] * len(windows),
            statistics.fmean(shares),
            seconds,
            recorders[temperature].trace(),
            channels,
        )
        for temperature, by_round in passed.items()
    ]


class _Sampler:
    """Draws drafts and decides on them, as `adapter.sampling` does for requests with a temperature and nothing else."""

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)
        self._probs: list[torch.Tensor] = []

    def first(self, logits: torch.Tensor) -> torch.Tensor:
        token = self.draft(0, logits)
        self._probs.clear()
        return token

    def draft(self, step: int, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        self._probs.append(torch.softmax(logits / self.temperature, dim=-1))
        return sample(self._probs[-1], self._coins(len(logits)))

    def accept(self, logits: RoundLogits) -> Acceptance:
        if self.temperature == 0:
            return accept_greedy(logits.tokens, logits.target.argmax(dim=-1))
        num_reqs, num_steps = logits.tokens.shape
        target = torch.softmax(logits.target / self.temperature, dim=-1)
        coins, final_coins = self._coins(num_reqs, num_steps), self._coins(num_reqs)
        probs = torch.stack(self._probs, dim=1)
        self._probs.clear()
        return accept_chain(logits.tokens, target, coins, final_coins, probs)

    def _coins(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator, device=self._generator.device, dtype=torch.float64)


def measure_own(
    model: PagedModel, setting: Setting, prompts: Prompts, temperature: float, *, new_tokens: int, seed: int = 0
) -> Measurement:
    """Speculative decoding until each request has `new_tokens` tokens, the prefill's counted; none ends it early."""
    started = time.monotonic()
    drafter = Drafter(model, setting, prompts)
    sampler = _Sampler(temperature, seed, model.device)
    num_reqs, num_steps = len(prompts.lens), setting.config.num_steps
    current = sampler.first(prompts.next_logits)
    committed = prompts.lens.clone()
    rounds = torch.zeros(num_reqs, dtype=torch.int64)
    # [num_reqs, k + 1]: rounds with so many correct drafts
    outcomes = torch.zeros(num_reqs, num_steps + 1, dtype=torch.int64)
    recorder = Recorder(temperature)
    positions = torch.arange(num_steps, device=model.device)
    shares = []
    while True:
        # the token from the prefill, and what rounds accepted
        produced = 1 + committed - prompts.lens
        rows = torch.nonzero(produced < new_tokens).squeeze(1)
        if not len(rows):
            break
        shares += [setting.read_share(kv_len) for kv_len in committed[rows].tolist()]
        logits = drafter.round(rows, committed[rows], current[rows], sampler.draft)
        acceptance = sampler.accept(logits)
        current[rows] = acceptance.bonus_tokens
        committed[rows] += acceptance.accept_lens
        recorder.add(rows, logits.drafts, positions < acceptance.accept_lens[:, None] - 1)
        rounds[rows.cpu()] += 1
        outcomes[rows.cpu(), acceptance.accept_lens.cpu().long() - 1] += 1
    # [num_reqs, k]: rounds with at least j correct drafts
    at_least = outcomes.flip(1).cumsum(1).flip(1)[:, 1:].double()
    reached = torch.cat([rounds.sum()[None], at_least.sum(0)[:-1]])
    return Measurement(
        setting,
        "own",
        temperature,
        (at_least / rounds[:, None]).tolist(),
        (at_least.sum(0) / reached).tolist(),
        rounds.tolist(),
        statistics.fmean(shares),
        time.monotonic() - started,
        recorder.trace(),
        drafter.channels.shares(),
    )
