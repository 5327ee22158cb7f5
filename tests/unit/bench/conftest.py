"""Targets, machines and records for the benchmark's tests; nothing here starts a server."""

from __future__ import annotations

import pytest

from sglang_sparsespec.bench.cells import Contender, Job, Scene, Target
from sglang_sparsespec.bench.machine import Machine
from sglang_sparsespec.bench.shapes import SHAPES, shape_from_config
from sglang_sparsespec.config import SELECTIONS

GIB = 1 << 30


@pytest.fixture
def h100() -> Machine:
    return Machine("NVIDIA H100 80GB HBM3", True, 79 * GIB, ("flashinfer", "triton", "fa3"))


@pytest.fixture
def h200() -> Machine:
    return Machine("NVIDIA H200", True, 139 * GIB, ("flashinfer", "triton", "fa3"))


@pytest.fixture
def small_card() -> Machine:
    """Two servers of a small model fit, three do not."""
    return Machine("NVIDIA A2", True, 15 * GIB, ("flashinfer", "triton"))


@pytest.fixture
def laptop() -> Machine:
    missing = {"flashinfer": "it needs a GPU", "intel_amx": "another build"}
    return Machine("CPU", False, 16 * GIB, ("torch_native",), missing)


@pytest.fixture
def shape_target() -> Target:
    shape = shape_from_config(SHAPES["qwen3-1.7b"])
    return Target("qwen3-1.7b", "/shapes/qwen3-1.7b", "bfloat16", shape, has_weights=False)


@pytest.fixture
def real_target() -> Target:
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    return Target("small", "/models/small", "bfloat16", shape_from_config(config))


@pytest.fixture
def plain() -> Contender:
    return Contender("plain/flashinfer", "SGLang, flashinfer", ("--attention-backend", "flashinfer"))


@pytest.fixture
def ours() -> Contender:
    args = ("--speculative-algorithm", "SPARSESPEC", "--sparsespec-selection", SELECTIONS[0])
    return Contender("sparsespec/pillar", "policy pillar in our engine", args, 7.16)


@pytest.fixture
def job(real_target: Target, plain: Contender, ours: Contender) -> Job:
    return Job(real_target, (plain, ours), (Scene(2, 64, 8), Scene(4, 64, 8)), 2, real_target.name)
