"""Tensor parallelism on the host: what one scheduler process sees and the others may not, they decide on together.

Every rank has a scheduler of its own, and all go through the same loop over the same requests: SGLang broadcasts what
arrives, tokens are rank 0's (`ranks.py`), and queues, page tables and pools follow from both. Two things do not: clocks
(whether a copy is done, what a round took) and whether memory could be had. What follows from those is asked of all
ranks here, and only then.

The collectives go over SGLang's CPU group of the ranks, on which it broadcasts the requests of an iteration, and run in
the same thread; so each rank enters them in the order of the program. A rank that left one out would hang the server:
whoever calls says why no rank can.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sglang_sparsespec.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


PADDED_TO = 32
"""Values of an all-reduce, so that ranks which ask about more or fewer things can still be told that they do."""


class HostRanks:
    """The schedulers of a server; one alone asks nobody.

    Args:
        group: for CPU tensors (gloo); None where there is one rank.
        rank: of this process in it.
        size: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, rank: int = 0, size: int = 1) -> None:
        self._group = group
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which chooses what is chosen once and speaks where one rank speaks."""
        return self.rank == 0

    def all_hold(self, question: str, answers: Mapping[str, bool]) -> dict[str, bool]:
        """Whether each of `answers` is true on every rank; one all-reduce.

        Args:
            question: the same on all ranks.
            answers: of this rank, by name; the names and their order are the same on all ranks.

        Raises:
            RankError: some rank asks something else, so that the ranks have come to different states.
        """
        agreed = self._smallest([question, *answers], [int(answer) for answer in answers.values()])
        return {name: bool(least) for name, least in zip(answers, agreed, strict=True)}

    def least(self, question: str, value: int) -> int:
        """The smallest `value` of any rank; one all-reduce.

        Raises:
            RankError: as for `all_hold`.
        """
        return self._smallest([question], [value])[0]

    def of_rank_0(self, value: int) -> int:
        """Rank 0's `value`; one broadcast, for which rank 0 does not wait."""
        return value if self.size == 1 else self._broadcast(value)

    def _smallest(self, question: Sequence[str], values: list[int]) -> list[int]:
        if self.size == 1:
            return values
        # all ranks have the same mark if the smallest is the largest
        mark = zlib.crc32("\0".join(question).encode())
        said = [mark, -mark, *values]
        low, negated_high, *agreed = self._all_reduce_min(said + [0] * (-len(said) % PADDED_TO))
        if low != -negated_high:
            raise RankError(self.rank, " ".join(question))
        return agreed[: len(values)]

    # What the tests replace: the group itself

    def _all_reduce_min(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group)
        return tensor.tolist()

    def _broadcast(self, value: int) -> int:
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(tensor, group=self._group, group_src=0)
        return int(tensor)
