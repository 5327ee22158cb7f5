"""`target_probs` and `penalise_chain` against the functions of SGLang that they stand in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec.speculation.distribution import target_probs
from sglang_sparsespec.speculation.penalties import PenaltyLedger, PenaltyParams, penalise_chain

pytestmark = pytest.mark.adapter

TOP_K_ALL = 1 << 30


def _host_probs(
    monkeypatch: pytest.MonkeyPatch,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
) -> torch.Tensor:
    """The weights that the host's torch sampler hands to torch.multinomial, put back in vocabulary order."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    need_min_p = bool((min_ps > 0).any())
    weights = torch.zeros_like(logits)
    for rank in range(logits.shape[1]):
        seen: list[torch.Tensor] = []

        def pick(sorted_weights: torch.Tensor, num_samples: int, rank: int = rank, seen: Any = seen) -> torch.Tensor:
            seen.append(sorted_weights.clone())
            return torch.full((sorted_weights.shape[0], num_samples), rank)

        probs = torch.softmax(logits / temperatures, dim=-1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", pick)
            tokens = top_k_top_p_min_p_sampling_from_probs_torch(
                probs, top_ks, top_ps, min_ps, need_min_p, None, torch.zeros(logits.shape[0])
            )
        weights.scatter_(1, tokens.long().unsqueeze(1), seen[0][:, rank : rank + 1])
    return weights / weights.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("bound", [False, True], ids=["sorted", "max_top_k"])
@pytest.mark.parametrize("with_min_p", [False, True], ids=["no min_p", "min_p"])
def test_target_probs_equals_the_hosts_torch_sampler(
    monkeypatch: pytest.MonkeyPatch, tied: bool, bound: bool, with_min_p: bool
) -> None:
    """Without it, speculation would be lossless towards a distribution that the host never samples from."""
    torch.manual_seed(0)
    num_rows, vocab_size = 96, 16
    logits = torch.randn(num_rows, vocab_size) * 2
    if tied:
        logits = logits.round()
    temperatures = torch.rand(num_rows, 1) + 0.3
    top_ks = torch.randint(1, 12, (num_rows,), dtype=torch.int32)
    if not bound:
        top_ks[::3] = TOP_K_ALL
        top_ks[1::3] = vocab_size + 3
    top_ps = torch.rand(num_rows)
    top_ps[::4] = 1.0
    top_ps[1] = 1e-9
    min_ps = torch.rand(num_rows) * with_min_p
    min_ps[2] = float(with_min_p)
    temperatures[top_ks == 1] = 1.0  # as the host normalises greedy requests
    actual = target_probs(
        logits,
        temperatures=temperatures,
        top_ks=top_ks,
        top_ps=top_ps,
        min_ps=min_ps,
        need_top_k=True,
        need_top_p=True,
        need_min_p=with_min_p,
        max_top_k=11 if bound else None,
    )
    expected = _host_probs(monkeypatch, logits, temperatures, top_ks, top_ps, min_ps)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


class _Batch(SimpleNamespace):
    """A namespace that the host can hold weakly."""


def _request(row: int) -> SimpleNamespace:
    """Requests that differ in which penalties they have; the last has none."""
    return SimpleNamespace(
        sampling_params=SimpleNamespace(
            frequency_penalty=[0.3, 0.0, -0.2, 0.0][row],
            presence_penalty=[0.0, 0.7, 0.4, 0.0][row],
            repetition_penalty=[1.2, 1.0, 0.8, 1.0][row],
            min_new_tokens=[4, 0, 7, 0][row],
            stop_token_ids=[{3}, None, {1, 2}, None][row],
        ),
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=[9, 9, None, 9][row]),
    )


@pytest.mark.parametrize("is_overlapped", [False, True], ids=["applied at once", "accumulated first"])
@pytest.mark.parametrize("chain_len", [1, 4])
def test_penalise_chain_equals_the_hosts_penalizers_token_by_token(chain_len: int, is_overlapped: bool) -> None:
    """Without it, our order or our counting could differ from penaltylib, and greedy outputs with it."""
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

    torch.manual_seed(1)
    vocab_size, num_reqs, num_rounds = 10, 4, 3
    requests = [_request(row) for row in range(num_reqs)]
    batch = _Batch(reqs=requests, device="cpu")
    host = penaltylib.BatchedPenalizerOrchestrator(
        vocab_size=vocab_size,
        batch=batch,
        penalizers={
            penaltylib.BatchedFrequencyPenalizer,
            penaltylib.BatchedMinNewTokensPenalizer,
            penaltylib.BatchedPresencePenalizer,
            penaltylib.BatchedRepetitionPenalizer,
        },
    )
    # the order of additive before scaling, as SamplingBatchInfo.apply_logits_bias has it when overlapped; applied at
    # once, the host goes through a set of classes, whose order we pin here
    host.penalizers = dict(sorted(host.penalizers.items(), key=lambda item: item[1].is_multiplicative))
    params = PenaltyParams(
        frequency=torch.tensor([r.sampling_params.frequency_penalty for r in requests]),
        presence=torch.tensor([r.sampling_params.presence_penalty for r in requests]),
        repetition=torch.tensor([r.sampling_params.repetition_penalty for r in requests]),
        min_new_tokens=torch.tensor([r.sampling_params.min_new_tokens for r in requests], dtype=torch.int32),
        stop_token_ids=torch.tensor([[3, 9], [9, 10], [1, 2], [9, 10]]),
    )
    rids = [f"r{row}" for row in range(num_reqs)]
    ledger = PenaltyLedger()
    first = torch.randint(0, vocab_size, (num_reqs,))
    for rid, token in zip(rids, first.tolist(), strict=True):
        ledger.start(rid, [token], vocab_size, "cpu")
    current = first
    with torch.compiler.set_stance("force_eager"):
        for _ in range(num_rounds):
            chain = torch.cat([current.unsqueeze(1), torch.randint(0, 4, (num_reqs, chain_len - 1))], dim=1)
            logits = torch.randn(num_reqs, chain_len, vocab_size) * 2
            expected = logits.clone()
            counts, output_lens = ledger.stack(rids)
            penalise_chain(logits, counts=counts, output_lens=output_lens, chain=chain, params=params)
            for t in range(chain_len):
                host.cumulate_output_tokens(chain[:, t])
                row = expected[:, t].clone()
                if is_overlapped:
                    additive = torch.zeros_like(row)
                    host.accumulate_additive_penalties(additive)
                    row.add_(additive)
                    apply_scaling_penalties(row, host.accumulate_scaling_penalties())
                else:
                    host.apply(row)
                expected[:, t] = row
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
            # every draft was right: the ledger and the host have now seen the same tokens but for the bonus
            current = torch.randint(0, 4, (num_reqs,))
            accepted = torch.cat([chain[:, 1:], current.unsqueeze(1)], dim=1)
            ledger.append(rids, accepted, torch.full((num_reqs,), chain_len, dtype=torch.int32))
