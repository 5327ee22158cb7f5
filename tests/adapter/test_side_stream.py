"""Work beside other work: in order where it has to be, also when captured."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.adapter.side_stream import SideStream

STEPS = 200


def slow(x: torch.Tensor) -> torch.Tensor:
    """Long enough that whoever does not wait sees too little."""
    for _ in range(STEPS):
        x = x + 1
    return x


def both(beside: SideStream, x: torch.Tensor) -> torch.Tensor:
    """What is beside needs what came before, and what comes after the join needs it."""
    out = torch.empty_like(x)
    start = slow(x)
    with beside:
        out.copy_(slow(start))
    other = slow(start)
    beside.join()
    return out + other


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inputs_are_there_and_results_are_waited_for(device: str) -> None:
    """A fork or a join that is missing: stale inputs, or a result that is not there yet."""
    beside = SideStream(device)
    x = torch.arange(1 << 20, device=device, dtype=torch.float64)
    for i in range(3):
        assert torch.equal(both(beside, x + i), 2 * (x + i) + 4 * STEPS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_error_beside_leaves_the_stream(device: str) -> None:
    """Everything after it would run on the side stream, which nobody waits for."""
    beside = SideStream(device)
    stream = torch.cuda.current_stream() if device == "cuda" else None
    with pytest.raises(ValueError, match="no"), beside:
        raise ValueError("no")
    assert stream is None or torch.cuda.current_stream() == stream


@pytest.mark.gpu
def test_it_is_captured_as_a_branch() -> None:
    """A replay that does the work of the capture once, or not at all."""
    beside = SideStream("cuda")
    x = torch.zeros(1 << 20, device="cuda")
    both(beside, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both(beside, x)
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(out, torch.full_like(out, 2 * value + 4 * STEPS))
