"""Errors of this package. Each message has four parts: the thing, what it was, what is allowed, what to do."""

from __future__ import annotations


class SparseSpecError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SparseSpecError, ValueError):
    """A start-up option, or a combination of options, that cannot be served.

    A ValueError as well, because SGLang reports those to the user without a traceback of ours.
    """

    def __init__(self, thing: str, value: object, allowed: str, advice: str) -> None:
        super().__init__(f"{thing} is {value!r}; it must be {allowed}. {advice}")


class RequestError(SparseSpecError, ValueError):
    """A request that asks for something SPARSESPEC cannot do exactly; reported to the client as HTTP 400."""

    def __init__(self, thing: str, value: object, allowed: str, advice: str) -> None:
        super().__init__(
            f"{thing} is {value!r}; under --speculative-algorithm SPARSESPEC it must be {allowed}. {advice}"
        )


class HostContractError(SparseSpecError, RuntimeError):
    """The installed SGLang lacks something this plugin stands on."""


class RankError(SparseSpecError, RuntimeError):
    """Tensor-parallel ranks came to different states, and would wait for each other for ever: a bug in this package."""

    def __init__(self, rank: int, question: str) -> None:
        super().__init__(
            f"rank {rank} asks about {question!r}, another rank about something else; all ranks must ask the same. "
            "Report it, and start with --tp-size 1 or without --sparsespec-host-memory-gb meanwhile."
        )


class PinError(SparseSpecError, RuntimeError):
    """CUDA does not pin host memory.

    Args:
        num_bytes: that were asked for.
        code: of cudaHostRegister.
    """

    def __init__(self, num_bytes: int, code: int) -> None:
        super().__init__(f"CUDA does not pin {num_bytes / 1e9:.3g} GB of host memory (cudaError {code}).")


class AccountError(SparseSpecError, RuntimeError):
    """The accounts of offloaded KV do not balance: a bug in this package."""
