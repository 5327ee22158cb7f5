"""The package's parity rule, under the name that tests know."""

from sglang_sparsespec.bench.parity import (
    RECORDING,
    ParityReport,
    ReferenceOutput,
    Verdict,
    compare_greedy,
    reference_output,
)

__all__ = ["RECORDING", "ParityReport", "ReferenceOutput", "Verdict", "compare_greedy", "reference_output"]
