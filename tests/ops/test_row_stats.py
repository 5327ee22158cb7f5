"""row_stats and token_probs against float64, on rows such as grammars, padding and low temperatures make."""

from __future__ import annotations

import pytest
import torch

from sglang_sparsespec.ops.row_stats import RowStats, row_stats, token_probs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 7, 1000, 49_152 + 3]
NUM_REQS, WIDTH = 3, 4


def stats_of(
    backend: str,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    steps: torch.Tensor | None = None,
    floors: torch.Tensor | None = None,
) -> RowStats:
    """The public function, or the kernels, with tiles so small that small rows have several."""
    if backend != "triton":
        return row_stats(logits, temperatures, steps=steps, floors=floors)
    from sglang_sparsespec.ops.row_stats.triton_impl import row_stats_triton

    return row_stats_triton(logits, temperatures, steps, floors, block=128 if logits.shape[2] < 4096 else 8192)


def probs_of(backend: str, *args: object) -> torch.Tensor:
    if backend != "triton":
        *tensors, is_greedy = args
        return token_probs(*tensors, is_greedy=is_greedy)  # type: ignore[arg-type]
    from sglang_sparsespec.ops.row_stats.triton_impl import token_probs_triton

    return token_probs_triton(*args)  # type: ignore[arg-type]


def hostile_logits(vocab_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[R, W, V]: strided rows with NaN before, between and after them, masked tokens, ties and masked tiles."""
    generator = torch.Generator().manual_seed(vocab_size)
    rows = (torch.randn(NUM_REQS, WIDTH, vocab_size, generator=generator) * 6).to(dtype)
    rows[:, 1] = rows[:, 1].round()
    if vocab_size > 1:
        rows[:, 2, ::2] = -torch.inf
        # one token only, and that one last
        rows[1, 3, :-1] = -torch.inf
        rows[2, 0, : vocab_size // 2] = -torch.inf
    padded = torch.full((WIDTH, NUM_REQS, vocab_size + 5), torch.nan, dtype=dtype)
    padded[:, :, 2 : vocab_size + 2] = rows.transpose(0, 1)
    return padded.to(device)[:, :, 2 : vocab_size + 2].transpose(0, 1)


def temperatures_on(device: torch.device) -> torch.Tensor:
    """Among them one at which exp(l) of plain float32 logits would overflow."""
    return torch.tensor([0.01, 0.6, 1.7], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_matches_softmax_in_float64(backend: str, device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    """A tile read past the vocabulary, merged with a wrong weight or without its offset would pass elsewhere."""
    logits, temperatures = hostile_logits(vocab_size, dtype, device), temperatures_on(device)
    stats = stats_of(backend, logits, temperatures)
    rows = logits.cpu().double()
    scaled = rows / temperatures.cpu().double()[:, None, None]
    assert stats.floor is None
    for actual, wanted in zip(stats[:3], (torch.int64, torch.float32, torch.float32), strict=True):
        assert actual.shape == (NUM_REQS, WIDTH)
        assert actual.dtype == wanted
    first = [[row.tolist().index(row.max().item()) for row in req] for req in rows]
    assert stats.best.tolist() == first
    assert torch.equal(stats.top.cpu().double(), rows.amax(dim=2))
    expected = (scaled - scaled.amax(dim=2, keepdim=True)).exp().sum(dim=2)
    torch.testing.assert_close(stats.mass.cpu().double(), expected, rtol=1e-5, atol=0.0)
    lse = stats.top.cpu().double() / temperatures.cpu().double().unsqueeze(1) + stats.mass.cpu().double().log()
    torch.testing.assert_close(lse, scaled.logsumexp(dim=2), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_steps_choose_one_row_of_each_request(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """The row of another request or step, or one past the last, would pass where all rows are read."""
    logits, temperatures = hostile_logits(1000, torch.bfloat16, device), temperatures_on(device)
    every = stats_of(backend, logits, temperatures)
    steps = torch.tensor([2, 0, WIDTH], dtype=dtype, device=device)
    some = stats_of(backend, logits, temperatures, steps)
    for ours, theirs in zip(some[:3], every[:3], strict=True):
        assert ours.tolist() == [theirs[0, 2].item(), theirs[1, 0].item(), theirs[2, WIDTH - 1].item()]


@pytest.mark.parametrize(("num_reqs", "width"), [(0, 3), (2, 0)])
def test_no_rows_at_all(backend: str, device: torch.device, num_reqs: int, width: int) -> None:
    """A launch over an empty grid fails, and only a server that drains would show it."""
    logits, temperatures = torch.zeros(num_reqs, width, 9, device=device), torch.ones(num_reqs, device=device)
    stats = stats_of(backend, logits, temperatures)
    assert all(values.shape == (num_reqs, width) for values in stats[:3])
    tokens = torch.zeros(num_reqs, width, dtype=torch.int64, device=device)
    assert probs_of(backend, logits, stats, temperatures, tokens, None).shape == (num_reqs, width)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_best_is_a_token_even_of_a_broken_row(backend: str, device: torch.device, value: float) -> None:
    """Without it, a NaN logit upstream would become an illegal address downstream instead of a wrong token."""
    logits = torch.full((1, 1, 130), value, device=device)
    assert 0 <= stats_of(backend, logits, torch.ones(1, device=device)).best.item() < 130


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_below_a_floor_do_not_count(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A floor of another row, one that drops its own logit, or one that a single probability ignores would pass."""
    logits, temperatures = hostile_logits(1000, dtype, device), temperatures_on(device)
    rows = logits.cpu().double()
    ranks = torch.tensor([[1, 2, 900, 1], [20, 3, 50, 400], [1000, 7, 5, 2]])
    floors = rows.sort(dim=2, descending=True).values.gather(2, ranks.unsqueeze(2) - 1)
    kept = rows.masked_fill(rows < floors, -torch.inf)
    expected = torch.softmax(kept / temperatures.cpu().double()[:, None, None], dim=2)
    floors = floors.squeeze(2).float().to(device)
    stats = stats_of(backend, logits, temperatures, floors=floors)
    assert stats.floor is floors
    torch.testing.assert_close(1 / stats.mass.cpu().double(), expected.amax(dim=2), rtol=1e-5, atol=0.0)
    dropped = rows.argmin(dim=2)
    for tokens in (rows.argmax(dim=2), dropped, torch.full_like(dropped, 400)):
        wanted = expected.gather(2, tokens.unsqueeze(2)).squeeze(2)
        actual = probs_of(backend, logits, stats, temperatures, tokens.to(device), None)
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=2e-5, atol=1e-37)
    steps = torch.tensor([2, 0, 3], device=device)
    of_steps = floors[torch.arange(NUM_REQS, device=device), steps]
    some = stats_of(backend, logits, temperatures, steps, of_steps)
    assert some.mass.tolist() == [stats.mass[r, step].item() for r, step in enumerate(steps.tolist())]


@pytest.mark.parametrize("vocab_size", [7, 1000])
@pytest.mark.parametrize("num_tokens", [0, 2, WIDTH])
@pytest.mark.parametrize("has_greedy", [False, True])
def test_token_probs_are_those_of_the_softmax(
    backend: str, device: torch.device, vocab_size: int, num_tokens: int, has_greedy: bool
) -> None:
    """A token's row, a request's temperature or the one-hot row of a greedy request could be mistaken."""
    logits, temperatures = hostile_logits(vocab_size, torch.bfloat16, device), temperatures_on(device)
    stats = stats_of(backend, logits, temperatures)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (num_tokens, NUM_REQS), generator=generator, dtype=torch.int32).T
    if num_tokens:
        # the best, a masked one
        tokens[1, 0], tokens[0, 1] = int(stats.best[1, 0]), int(stats.best[0, 1])
        tokens[2, 0] = 0
    is_greedy = torch.tensor([False, True, False]) if has_greedy else None
    rows = torch.softmax(logits.cpu().double() / temperatures.cpu().double()[:, None, None], dim=2)
    if has_greedy:
        rows[1] = torch.nn.functional.one_hot(stats.best[1].cpu(), vocab_size)
    expected = rows[:, :num_tokens].gather(2, tokens.long().unsqueeze(2)).squeeze(2)
    on_device = None if is_greedy is None else is_greedy.to(device)
    actual = probs_of(backend, logits, stats, temperatures, tokens.to(device), on_device)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-5, atol=1e-37)


def test_rejects_wrong_arguments() -> None:
    """Rows without a contiguous vocabulary, or of another request count, would be read from wrong addresses."""
    logits, temperatures = torch.zeros(2, 3, 8), torch.ones(2)
    stats = row_stats(logits, temperatures)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for bad, name in (
        ((logits[0], temperatures), "logits"),
        ((logits.double(), temperatures), "logits"),
        ((logits[:, :, :0], temperatures), "logits: expected a vocabulary"),
        ((logits.transpose(1, 2), temperatures), "logits"),
        ((logits, temperatures[:1]), "temperatures"),
        ((logits, temperatures.double()), "temperatures"),
    ):
        with pytest.raises(ValueError, match=name):
            row_stats(*bad)
    with pytest.raises(ValueError, match="steps"):
        row_stats(logits, temperatures, steps=temperatures)
    with pytest.raises(ValueError, match="steps"):
        row_stats(logits[:, :0], temperatures, steps=tokens[:, 0])
    for floors in (torch.zeros(2), torch.zeros(2, 3).double(), torch.zeros(3, 2).T):
        with pytest.raises(ValueError, match="floors"):
            row_stats(logits, temperatures, floors=floors)
    with pytest.raises(ValueError, match="tokens"):
        token_probs(logits, stats, temperatures, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"stats\.best"):
        token_probs(logits, RowStats(*(values[:1] for values in stats[:3])), temperatures, tokens)
    with pytest.raises(ValueError, match="is_greedy"):
        token_probs(logits, stats, temperatures, tokens, is_greedy=temperatures)


@pytest.mark.gpu
def test_can_be_captured_in_a_graph() -> None:
    """A hidden synchronisation, or the public function taking the reference on a GPU, would pass every other test."""
    logits = torch.randn(16, 9, 151_936, device="cuda", dtype=torch.bfloat16) * 4
    temperatures = torch.full((16,), 0.6, device="cuda")
    steps = torch.zeros(16, dtype=torch.int64, device="cuda")
    row_stats(logits, temperatures, steps=steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = row_stats(logits, temperatures, steps=steps)
    steps.fill_(8)
    graph.replay()
    expected = torch.softmax(logits[:, 8].double() / 0.6, dim=1).amax(dim=1)
    torch.testing.assert_close(1 / stats.mass.double(), expected, rtol=1e-5, atol=0.0)
