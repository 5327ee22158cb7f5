"""What schedulers of several ranks decide together: over gloo in processes, as in a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sglang_sparsespec.adapter.host_ranks import HostRanks
from sglang_sparsespec.errors import RankError
from tests.support.rank_threads import Meeting

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.adapter

SIZE = 3


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    # not the default group, as in SGLang
    ranks = HostRanks(dist.new_group(backend="gloo"), rank, SIZE)
    said: list[Any] = [
        ranks.leads,
        ranks.all_hold("done", {"a": True, "b": rank != 1, "c": rank == 1, "d": True}),
        ranks.least("bytes", 10**12 + (SIZE - rank)),
        ranks.of_rank_0(7 - rank),
    ]
    try:
        ranks.all_hold("done", {"a": True} | {f"request {rank // 2}-{i}": True for i in range(1 + rank // 2)})
    except RankError as error:
        said.append(str(error))
    # and the group goes on
    said.append(ranks.of_rank_0(-rank))
    torch.save(said, f"{folder}/rank-{rank}")
    dist.destroy_process_group()


def test_ranks_come_to_the_same_answers(tmp_path: Path) -> None:
    """An answer of its own on any rank is a round that the others do not make."""
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=SIZE)
    for rank in range(SIZE):
        leads, done, least, told, error, last = torch.load(tmp_path / f"rank-{rank}", weights_only=False)
        assert leads == (rank == 0)
        assert done == {"a": True, "b": False, "c": False, "d": True}
        assert (least, told, last) == (10**12 + 1, 7, 0)
        assert error.startswith(f"rank {rank} asks about 'done a request {rank // 2}-0"), error


def test_threads_stand_in_for_processes() -> None:
    """The fake that other tests decide with: what it answers is what gloo answers."""

    def ask(ranks: HostRanks) -> tuple[Any, ...]:
        return (
            ranks.all_hold("done", {"a": True, "b": ranks.rank != 1}),
            ranks.least("bytes", 5 - ranks.rank),
            ranks.of_rank_0(7 - ranks.rank),
        )

    meeting = Meeting(2)
    assert meeting.run(ask) == [({"a": True, "b": False}, 4, 7)] * 2
    assert meeting.calls == ["smallest", "smallest", "rank 0"]
    with pytest.raises(RankError, match=r"^rank \d asks about 'room r\d'"):
        Meeting(2).run(lambda ranks: ranks.all_hold("room", {f"r{ranks.rank}": True}))
    with pytest.raises(AssertionError, match="collectives that do not match"):
        Meeting(2).run(lambda ranks: ranks.least("a", 1) if ranks.leads else ranks.of_rank_0(1))


def test_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective in every iteration of a server on one card."""
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("asked"))
    alone = HostRanks()
    assert alone.leads
    assert alone.all_hold("done", {"a": True, "b": False}) == {"a": True, "b": False}
    assert (alone.least("bytes", 3), alone.of_rank_0(4)) == (3, 4)
