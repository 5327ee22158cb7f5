"""Work of one forward that may run beside other work of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import TracebackType


class SideStream(AbstractContextManager[None]):
    """Queues what stands under `with` beside what follows it, until `join`; on a CPU before it.

    Can be captured in a CUDA graph, where both become branches. Invariant: memory that work here writes for others was
    allocated outside of it, and is not freed before `join`; so nothing has to be recorded on another stream.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._stream = torch.cuda.Stream(device) if str(device).startswith("cuda") else None
        self._context: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        if self._stream is not None:
            # what has been queued so far is its input
            self._stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)
            self._context = None

    def join(self) -> None:
        """What is queued from now on waits for the work."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
