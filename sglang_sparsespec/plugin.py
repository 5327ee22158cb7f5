"""The entry point that SGLang calls in the server process and in every scheduler (group `sglang.srt.plugins`)."""

from __future__ import annotations

_registered = False


def register() -> None:
    """Register the algorithm SPARSESPEC and its options; idempotent.

    SGLang logs an exception raised here and goes on without the plugin, so what must not be missed is checked again
    when the algorithm is asked for (`adapter.server_args`, `adapter.worker`).
    """
    global _registered
    if _registered:
        return
    from sglang_sparsespec.adapter import registration

    registration.register()
    _registered = True
