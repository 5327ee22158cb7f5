"""Server tests in both schedules: all of them with --long, a few in the other schedule without it.

A test module has a fixture `schedule` over SCHEDULES and calls `skip_if_long`, so that what costs a server start and a
few requests runs always, and what repeats a whole feature list runs with --long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection

SCHEDULES: dict[str, tuple[str, ...]] = {
    "lockstep": (),
    "unified": ("--sparsespec-schedule=unified", "--sparsespec-verify-attention=fused"),
}


def skip_if_long(request: pytest.FixtureRequest, schedule: str, always: Collection[str]) -> None:
    """Skip a test in the unified schedule unless it is one of `always`, or --long was given."""
    name = request.function.__name__
    if schedule != "lockstep" and name not in always and not request.config.getoption("--long"):
        pytest.skip("takes minutes; --long runs it")
