"""Nothing that runs in a round may wait for the device: on a CPU by the operations used, on a GPU by CUDA itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_sparsespec.speculation import chunked
from sglang_sparsespec.speculation.acceptance import accept_chain, accept_greedy, accept_simulated
from sglang_sparsespec.speculation.budget import budget_tensor
from sglang_sparsespec.speculation.coins import UNSEEDED, mixed
from sglang_sparsespec.speculation.distribution import SamplingRule, sample, target_probs
from sglang_sparsespec.speculation.penalties import PenaltyLedger, PenaltyParams, penalise_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_REQS, NUM_STEPS, VOCAB = 5, 3, 1100
# operations whose result, or the shape of it, the host must know
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "repeat_interleave", "equal"}


class _RefuseWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


def _cases(device: str) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    """Name and call of everything that a round uses; inputs are made on the CPU, so that devices can be compared."""
    torch.manual_seed(0)
    logits = (torch.randn(NUM_REQS, NUM_STEPS + 1, VOCAB) * 3).to(device)
    draft_probs = torch.softmax(torch.randn(NUM_REQS, NUM_STEPS, VOCAB) * 3, dim=-1).to(device)
    drafts = torch.randint(0, VOCAB, (NUM_REQS, NUM_STEPS)).to(device)
    targets = torch.randint(0, VOCAB, (NUM_REQS, NUM_STEPS + 1)).to(device)
    coins, final_coins = torch.rand(NUM_REQS, NUM_STEPS).to(device), torch.rand(NUM_REQS).to(device)
    rows = NUM_REQS * (NUM_STEPS + 1)
    top_ks = torch.randint(1, 30, (rows,), dtype=torch.int32).to(device)
    probs = torch.softmax(logits, dim=-1)
    lens = torch.tensor([1, 4, 0, 2, 3], dtype=torch.int32).to(device)
    params = PenaltyParams(
        frequency=torch.rand(NUM_REQS).to(device),
        presence=torch.rand(NUM_REQS).to(device),
        repetition=(torch.rand(NUM_REQS) + 0.5).to(device),
        min_new_tokens=torch.tensor([0, 3, 5, 100, 2], dtype=torch.int32).to(device),
        stop_token_ids=torch.tensor([[3, 4], [7, VOCAB], [VOCAB, VOCAB], [0, 1], [9, 9]]).to(device),
    )
    seeds, positions = torch.tensor([1, 2, 3, 4, 5]).to(device), torch.arange(NUM_REQS).to(device)
    rids = [f"r{i}" for i in range(NUM_REQS)]

    def distribution(**options: Any) -> list[torch.Tensor]:
        result = target_probs(
            logits.view(rows, VOCAB),
            temperatures=torch.full((rows, 1), 0.7, device=device),
            top_ks=top_ks,
            top_ps=torch.full((rows,), 0.9, device=device),
            min_ps=torch.full((rows,), 0.01, device=device),
            need_top_k=True,
            need_top_p=True,
            need_min_p=True,
            **options,
        )
        return [result]

    def rounds(**options: Any) -> list[torch.Tensor]:
        """A round from logits: the first step's drafts, and acceptance of a chain."""
        rule = SamplingRule(
            temperatures=torch.full((NUM_REQS, 1), 0.7, device=device),
            top_ks=top_ks[:NUM_REQS],
            top_ps=torch.full((NUM_REQS,), 0.9, device=device),
            min_ps=torch.full((NUM_REQS,), 0.01, device=device),
            **options,
        )
        tokens, q_drafts = chunked.draw(logits[:, 0], rule, final_coins)
        chain = torch.cat([tokens.unsqueeze(1), drafts[:, 1:]], dim=1)
        q_drafts = q_drafts.unsqueeze(1).expand(-1, NUM_STEPS)
        kept = (q_drafts, logits[:, :NUM_STEPS])
        return [tokens, q_drafts, *chunked.accept(chain, logits.roll(1, 1), rule, coins, final_coins, *kept)]

    def penalties() -> list[torch.Tensor]:
        ledger = PenaltyLedger()
        for i, rid in enumerate(rids):
            ledger.start(rid, list(range(i)), VOCAB, device)
        ledger.append(rids, targets, lens)
        ledger.drop(rids[0])
        ledger.start(rids[0], [], VOCAB, device)
        counts, output_lens = ledger.stack(rids)
        penalised = logits.clone()
        penalise_chain(penalised, counts=counts, output_lens=output_lens, chain=targets, params=params)
        return [counts, output_lens, penalised]

    yield "budget", lambda: [budget_tensor(lens * 1000, ratio=0.07, min_budget=64, max_budget=128)]
    yield "coins", lambda: [mixed(seeds, positions, 4, stream=1)]
    yield "coins of unseeded rows", lambda: [mixed(torch.full_like(seeds, UNSEEDED), positions, 4) * 0]
    for order in ("joint", "sequential"):
        for ties in ("first", "all"):
            for bound in (None, 30):
                yield (
                    f"{order} {ties} {bound}",
                    lambda o=order, t=ties, b=bound: distribution(  # type: ignore[misc]
                        filter_order=o, ties=t, max_top_k=b
                    ),
                )
    yield "sample", lambda: [sample(probs[:, 0], final_coins)]
    limits = torch.tensor([0, 1, 2, 3, 9]).to(device)
    yield "greedy", lambda: list(accept_greedy(drafts, targets))
    yield "greedy, limited", lambda: list(accept_greedy(drafts, targets, limits))
    yield "chain, limited", lambda: list(accept_chain(drafts, probs, coins, final_coins, draft_probs, limits))
    yield "chain", lambda: list(accept_chain(drafts, probs, coins, final_coins, draft_probs))
    yield "chain, chosen drafts", lambda: list(accept_chain(drafts, probs, coins, final_coins, None))
    filters = {"need_top_k": True, "need_top_p": True, "need_min_p": True}
    yield "rounds from logits", lambda: rounds(**dict.fromkeys(filters, False))
    yield "rounds from logits, filtered", lambda: rounds(**filters)
    yield "rounds from logits, top-k", lambda: rounds(**filters, max_top_k=30)
    yield "rounds from logits, floors", lambda: rounds(**filters, max_top_k=30, ties="all")
    yield "simulated", lambda: list(accept_simulated(drafts, lens, lens))
    yield "penalties", penalties


NAMES = [name for name, _ in _cases("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_rounds_use_no_operation_that_waits_for_the_device(name: str) -> None:
    """Without it, one .item() or boolean mask would drain the GPU's queue every round, and only a profile show it."""
    call = dict(_cases("cpu"))[name]
    with _RefuseWaiting():
        call()


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
    ],
    ids=["item", "mask", "nonzero", "bool"],
)
def test_the_watcher_sees_operations_that_wait(offence: Callable[[torch.Tensor], object]) -> None:
    """Power: without it, the watcher could watch under names that torch no longer uses."""
    with pytest.raises(AssertionError, match="waits for the device"), _RefuseWaiting():
        offence(torch.randn(4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu_and_never_synchronises(name: str) -> None:
    """Without it, a kernel could differ on the device, or a hidden copy wait for it."""
    expected = dict(_cases("cpu"))[name]()
    call = dict(_cases("cuda"))[name]
    call()  # first calls may load modules and allocate
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-7)
