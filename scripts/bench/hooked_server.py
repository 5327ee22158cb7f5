"""What servers of studies share: a change to SPARSESPEC's own code in the process that runs the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def before_worker_runs(install: Callable[[], None]) -> None:
    """Call `install` once, when the worker has been made.

    SGLang loads plugins before it asks for the worker; importing the adapter here would be too early for that.
    """
    from sglang.srt.speculative import spec_registry

    create = spec_registry.CustomSpecAlgo.create_worker

    def create_and_install(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = create(self, *args, **kwargs)
        spec_registry.CustomSpecAlgo.create_worker = create
        install()
        return made

    spec_registry.CustomSpecAlgo.create_worker = create_and_install
