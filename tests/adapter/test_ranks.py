"""Two processes that draw different coins leave a round with the same tokens: rank 0's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_sparsespec.adapter.ranks import Ranks
from sglang_sparsespec.speculation.acceptance import Acceptance, accept_chain
from sglang_sparsespec.speculation.distribution import sample

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.adapter

NUM_REQS, NUM_STEPS, VOCAB = 5, 3, 11


@dataclasses.dataclass
class Group:
    """The part of SGLang's GroupCoordinator that is asked."""

    world_size: int
    num_broadcasts: int = 0

    def broadcast(self, tokens: torch.Tensor, src: int = 0) -> torch.Tensor:
        self.num_broadcasts += 1
        if self.world_size > 1:
            dist.broadcast(tokens, src=src)
        return tokens


def drafts_and_acceptance(coins: torch.Generator, ranks: Ranks | None) -> tuple[torch.Tensor, Acceptance]:
    """A round on logits that all ranks share, with coins that they do not."""
    shared = torch.Generator().manual_seed(7)
    target = torch.rand(NUM_REQS, NUM_STEPS + 1, VOCAB, generator=shared).softmax(-1)
    draft = torch.rand(NUM_REQS, NUM_STEPS, VOCAB, generator=shared).softmax(-1)
    flip = torch.rand(2 * NUM_STEPS + 1, NUM_REQS, generator=coins, dtype=torch.float64)
    tokens = torch.stack([sample(draft[:, step], flip[step]) for step in range(NUM_STEPS)], dim=1)
    if ranks is not None:
        tokens = ranks.agree(tokens)
    acceptance = accept_chain(tokens, target, flip[NUM_STEPS:-1].T, flip[-1], draft)
    return tokens, acceptance if ranks is None else ranks.agree_on_acceptance(acceptance)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    coins = torch.Generator().manual_seed(rank)
    group = Group(2)
    rounds: list[Any] = [drafts_and_acceptance(coins, Ranks(group)) for _ in range(20)]  # type: ignore[arg-type]
    torch.save((rounds, group.num_broadcasts), f"{folder}/rank-{rank}")
    dist.destroy_process_group()


def test_rank_0_decides(tmp_path: Path) -> None:
    """A rank that kept a token or a length of its own would wait for the others for ever, some rounds later."""
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    (rounds, calls), (others, _) = (torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in range(2))
    coins, other_coins = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    differed = 0
    for (tokens, acceptance), (other_tokens, other_acceptance) in zip(rounds, others, strict=True):
        alone_tokens, alone = drafts_and_acceptance(coins, None)
        differed += not torch.equal(alone_tokens, drafts_and_acceptance(other_coins, None)[0])
        assert torch.equal(tokens, alone_tokens)
        assert torch.equal(other_tokens, alone_tokens)
        for field in Acceptance._fields:
            wanted = getattr(alone, field)
            for got in (getattr(acceptance, field), getattr(other_acceptance, field)):
                assert got.dtype == wanted.dtype
                assert torch.equal(got, wanted), field
    assert differed > 10
    assert calls == 2 * len(rounds), "one broadcast for the drafts of a round, one for its acceptance"


def test_one_rank_asks_nobody() -> None:
    """A copy or a collective in every round of a server on one card."""
    group = Group(1)
    _, acceptance = drafts_and_acceptance(torch.Generator().manual_seed(0), None)
    assert Ranks(group).agree_on_acceptance(acceptance) is acceptance  # type: ignore[arg-type]
    assert group.num_broadcasts == 0
