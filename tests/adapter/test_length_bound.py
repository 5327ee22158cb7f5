"""What a round without lengths on the host takes for the longest that its requests may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


def test_a_request_that_has_just_ended_has_a_bound() -> None:
    """The scheduler dies where a request ends between the making of a batch and its round, as beside a grammar."""
    from sglang_sparsespec.adapter.worker import length_bound

    running: Any = SimpleNamespace(seqlen=40, kv=SimpleNamespace(kv_allocated_len=64))
    ended: Any = SimpleNamespace(seqlen=40, kv=None)
    assert length_bound(running, 9) == 64
    assert length_bound(ended, 9) == 49
