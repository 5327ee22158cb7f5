"""The Triton kernels without a GPU: this folder's tests once more, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the compiled kernels in this process")
def test_triton_kernels_agree_with_references_under_the_interpreter() -> None:
    """Nothing else executes a kernel where there is no GPU: an indexing bug would wait for the first one."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", os.path.dirname(__file__)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
