"""First and last verify query only: PillarAttn's scores at a fraction of the capture."""

from __future__ import annotations

from typing import ClassVar

from sglang_sparsespec.selection.pillar import PillarPolicy


class FirstLastPolicy(PillarPolicy):
    """Attention scores of the first and the last query of a verify; pooled forward like pillar's.

    Reference: Vegas (arXiv:2602.07223), which takes these two from inside its verify kernel.
    Deviation: the last query is the last draft's, accepted or not; acceptance is decided after the layers have run.
    """

    name: ClassVar[str] = "first-last"

    def captured_queries(self, num_queries: int) -> range:
        return range(0, num_queries, max(1, num_queries - 1))
