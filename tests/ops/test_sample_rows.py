"""sample_rows by its definition: a coin in the middle of a token's share of the mass must give that token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_sparsespec.ops.row_stats import row_stats
from sglang_sparsespec.ops.sample_rows import sample_rows
from sglang_sparsespec.ops.sample_rows.reference import sample_rows_reference

VOCABS = [1, 7, 1000, 49_152 + 3]
NUM_DRAFTS = 3
KINDS = ["none", "logits", "tokens"]


def draw(backend: str, logits: torch.Tensor, *args: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function, or the kernels, with tiles so small that small rows have several; statistics are made."""
    temperatures, _ = args
    floors, draft_floors = options.pop("floors", None), options.pop("draft_floors", None)
    stats = row_stats(logits, temperatures, floors=floors)
    if options.get("draft_logits") is not None:
        options["draft_stats"] = row_stats(
            options["draft_logits"], temperatures, steps=options["steps"], floors=draft_floors
        )
    if backend != "triton":
        return sample_rows(logits, stats, *args, **options)
    from sglang_sparsespec.ops.sample_rows.triton_impl import sample_rows_triton

    return sample_rows_triton(logits, stats, *args, block=128 if logits.shape[2] < 4096 else 8192, **options)


def masses(
    row: torch.Tensor, temperature: float, draft: torch.Tensor | int | None, *, is_greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """p of one row, and the mass that is sampled from, float64, by the definition."""

    def probs(logits: torch.Tensor) -> torch.Tensor:
        if is_greedy:
            best = logits.tolist().index(logits.max().item())
            return torch.nn.functional.one_hot(torch.tensor(best), logits.shape[0]).double()
        return torch.softmax(logits.double() / temperature, dim=0)

    p = probs(row)
    if draft is None:
        return p, p
    q = probs(draft) if isinstance(draft, torch.Tensor) else torch.zeros_like(p).index_fill(0, torch.tensor(draft), 1.0)
    residual = (p - q).clamp(min=0.0)
    return p, residual if residual.max() > 1e-6 else p


class Problem:
    """Logits of a target and its drafts whose rows are strided, with masked tokens; every third request is greedy."""

    def __init__(self, num_reqs: int, vocab_size: int, dtype: torch.dtype, kind: str) -> None:
        generator = torch.Generator().manual_seed(31)
        shape = (num_reqs, NUM_DRAFTS + 1, vocab_size + 3)
        target = torch.randn(shape, generator=generator) * 2
        noise = torch.randn(shape, generator=generator)
        if vocab_size > 7:
            target[:, :, 1::5] = -torch.inf
            target[1, :, : vocab_size // 2] = -torch.inf
        self.kind = kind
        self.logits = target.to(dtype)[:, :, :vocab_size]
        self.drafts = (target + noise).to(dtype)[:, :NUM_DRAFTS, :vocab_size]
        self.draft_tokens = torch.randint(0, vocab_size, (num_reqs, NUM_DRAFTS), generator=generator)
        self.temperatures = torch.linspace(0.2, 1.3, num_reqs)
        self.steps = torch.arange(num_reqs) % (NUM_DRAFTS + 1)
        self.is_greedy = torch.arange(num_reqs) % 3 == 2

    def mass(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        step = int(self.steps[r])
        draft: torch.Tensor | int | None = None
        if self.kind != "none" and step < NUM_DRAFTS:
            draft = self.drafts[r, step] if self.kind == "logits" else int(self.draft_tokens[r, step])
        return masses(self.logits[r, step], float(self.temperatures[r]), draft, is_greedy=bool(self.is_greedy[r]))

    def draw(self, backend: str, device: torch.device, coins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"steps": self.steps, "is_greedy": self.is_greedy}
        if self.kind == "logits":
            options["draft_logits"] = self.drafts
        if self.kind == "tokens":
            options["draft_tokens"] = self.draft_tokens
        moved = {name: tensor.to(device) for name, tensor in options.items()}
        return draw(backend, self.logits.to(device), self.temperatures.to(device), coins.to(device), **moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_a_coin_in_the_middle_of_a_token_gives_that_token(
    backend: str, device: torch.device, vocab_size: int, dtype: torch.dtype, kind: str
) -> None:
    """Mass of the wrong row, step, draft or temperature, or a boundary off by a token, would shift what is drawn."""
    num_reqs = 4 if vocab_size > 1000 else 9
    problem = Problem(num_reqs, vocab_size, dtype, kind)
    generator = torch.Generator().manual_seed(32)
    for _ in range(2):
        coins, expected, probs = [], [], []
        for r in range(num_reqs):
            p, mass = problem.mass(r)
            cdf = mass.cumsum(0)
            # one that rounding cannot take for its neighbour
            wide = (mass > 1e-5 * cdf[-1]).nonzero().squeeze(1)
            token = int(wide[torch.randint(len(wide), (1,), generator=generator)])
            coins.append(float((cdf[token] - mass[token] / 2) / cdf[-1]))
            expected.append(token)
            probs.append(float(p[token]))
        tokens, actual = problem.draw(backend, device, torch.tensor(coins, dtype=torch.float64))
        assert tokens.dtype == torch.int64
        assert actual.dtype == torch.float32
        assert tokens.tolist() == expected
        torch.testing.assert_close(actual.cpu().double(), torch.tensor(probs).double(), rtol=2e-5, atol=1e-9)


def test_every_token_is_reached_in_index_order(backend: str, device: torch.device) -> None:
    """Tokens at the edges of tiles could be skipped or drawn twice, and few random coins would not meet them."""
    vocab_size = 259
    row = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(33))).expand(vocab_size, 1, -1)
    cdf = torch.softmax(row[0, 0].double() / 0.9, dim=0).cumsum(0)
    coins = cdf - torch.diff(cdf, prepend=cdf.new_zeros(1)) / 2
    temperatures = torch.full((vocab_size,), 0.9, device=device)
    tokens, probs = draw(backend, row.to(device), temperatures, coins.to(device))
    assert tokens.tolist() == list(range(vocab_size))
    torch.testing.assert_close(probs.cpu().double().sum(), cdf[-1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coin", [0.0, 2.0**-24, 0.5, 1 - 2**-24, 1 - 2**-53])
def test_an_impossible_token_is_never_drawn(
    backend: str, device: torch.device, coin: float, kind: str, dtype: torch.dtype
) -> None:
    """A coin at the edge could give the first or last token of a row or tile, although a grammar masked it."""
    if dtype == torch.float32 and coin > 1 - 2**-24:
        pytest.skip("1 in float32")
    problem = Problem(8, 300, torch.bfloat16, kind)
    keep = [range(150, 151), range(299, 300), range(1), range(127, 130), range(128, 129), range(0, 300, 150)]
    for r, tokens in enumerate(keep):
        masked = torch.ones(300, dtype=torch.bool)
        masked[list(tokens)] = False
        problem.logits[r].masked_fill_(masked, -torch.inf)
    drawn, probs = problem.draw(backend, device, torch.full((8,), coin, dtype=dtype))
    for r, token in enumerate(drawn.tolist()):
        p, mass = problem.mass(r)
        assert mass[token] > 0
        torch.testing.assert_close(float(probs[r]), float(p[token]), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("vocab_size", [1, 1000])
def test_equal_distributions_leave_the_target(backend: str, device: torch.device, vocab_size: int) -> None:
    """Without a residual the coin would fall on nothing; with one of rounding errors, on any token."""
    problem = Problem(9, vocab_size, torch.float32, "logits")
    problem.drafts = problem.logits[:, :NUM_DRAFTS].clone()
    coins = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    expected = problem.draw(backend, device, coins)
    problem.kind = "none"
    for ours, theirs in zip(problem.draw(backend, device, coins), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["none", "logits"])
def test_logits_below_a_floor_are_not_drawn(backend: str, device: torch.device, kind: str) -> None:
    """A floor of another row, or of p where q is meant, would draw what a filter drops, or subtract what it dropped."""
    problem = Problem(12, 300, torch.bfloat16, kind)
    options = {"steps": problem.steps, "is_greedy": problem.is_greedy}
    options["floors"] = problem.logits.float().topk(9, dim=2).values[:, :, -1].contiguous()
    if kind == "logits":
        options["draft_logits"] = problem.drafts
        rows = problem.drafts[torch.arange(12), problem.steps.clamp(max=NUM_DRAFTS - 1)].float()
        options["draft_floors"] = rows.topk(6, dim=1).values[:, -1].contiguous()
    on_device = {name: tensor.to(device) for name, tensor in options.items()}
    floors = options["floors"].unsqueeze(2)
    problem.logits = problem.logits.float().masked_fill(problem.logits < floors, -torch.inf)
    if kind == "logits":
        floors = options["draft_floors"][:, None, None]
        problem.drafts = problem.drafts.float().masked_fill(problem.drafts < floors, -torch.inf)
    whole = Problem(12, 300, torch.bfloat16, kind).logits.to(device)
    for fraction in (0.02, 0.4, 0.97):
        coins, expected = [], []
        for r in range(12):
            _, mass = problem.mass(r)
            cdf = mass.cumsum(0)
            token = int((cdf > fraction * cdf[-1]).nonzero()[0])
            coins.append(float((cdf[token] - mass[token] / 2) / cdf[-1]))
            expected.append(token)
        given = torch.tensor(coins, dtype=torch.float64, device=device)
        tokens, _ = draw(backend, whole, problem.temperatures.to(device), given, **on_device)
        assert tokens.tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_row_gives_a_token(backend: str, device: torch.device, value: float, kind: str) -> None:
    """Without it, a NaN logit upstream would become an illegal address downstream instead of a wrong token."""
    problem = Problem(4, 131, torch.float32, kind)
    problem.logits[0] = value
    problem.logits[1, :, 130] = value
    problem.drafts[2] = value
    tokens, _ = problem.draw(backend, device, torch.full((4,), 0.999, dtype=torch.float64))
    assert all(0 <= token < 131 for token in tokens.tolist())


def test_no_requests(backend: str, device: torch.device) -> None:
    """A launch over an empty grid fails."""
    coins = torch.zeros(0, dtype=torch.float64, device=device)
    tokens, probs = draw(backend, torch.zeros(0, 1, 9, device=device), torch.ones(0, device=device), coins)
    assert tokens.shape == probs.shape == (0,)


def test_rejects_wrong_arguments() -> None:
    """Drafts without the step they were rejected at, or of another vocabulary, would be subtracted from wrong rows."""
    logits, temperatures, coins = torch.zeros(2, 4, 8), torch.ones(2), torch.zeros(2, dtype=torch.float64)
    stats, steps = row_stats(logits, temperatures), torch.zeros(2, dtype=torch.int64)
    drafts, tokens = logits[:, :3], torch.zeros(2, 3, dtype=torch.int64)
    q_stats = row_stats(drafts, temperatures, steps=steps)
    for options, complaint in (
        ({"draft_tokens": tokens}, "steps: expected a tensor"),
        ({"draft_tokens": tokens[:, :0], "steps": steps}, "drafts: expected None"),
        ({"draft_tokens": tokens.float(), "steps": steps}, "draft_tokens"),
        ({"draft_logits": drafts, "steps": steps}, "draft_stats"),
        ({"draft_logits": drafts, "draft_stats": stats, "steps": steps}, "draft_stats.best"),
        ({"draft_logits": drafts[..., :7], "draft_stats": q_stats, "steps": steps}, "draft_logits"),
        ({"draft_logits": drafts, "draft_stats": q_stats, "draft_tokens": tokens, "steps": steps}, "draft_tokens"),
        ({"draft_logits": drafts, "draft_stats": q_stats._replace(floor=coins.float()), "steps": steps}, "floor"),
        ({"is_greedy": steps}, "is_greedy"),
    ):
        with pytest.raises(ValueError, match=complaint):
            sample_rows(logits, stats, temperatures, coins, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coins"):
        sample_rows(logits, stats, temperatures, steps)
    with pytest.raises(ValueError, match="logits"):
        sample_rows(logits[:, :0], stats, temperatures, coins)


@pytest.mark.gpu
def test_graph_replay_follows_new_coins_and_steps() -> None:
    """A coin or step fixed at capture, or a hidden synchronisation, would pass every eager test."""
    problem = Problem(12, 151_936, torch.bfloat16, "logits")
    on_gpu = {name: value.cuda() for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    logits, drafts, temperatures = on_gpu["logits"], on_gpu["drafts"], on_gpu["temperatures"]
    steps, coins = on_gpu["steps"], torch.rand(12, device="cuda", dtype=torch.float64)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        options = {"steps": steps, "is_greedy": on_gpu["is_greedy"], "draft_logits": drafts}
        return draw("cuda", logits, temperatures, coins, **options)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, probs = run()
    coins.copy_(torch.rand(12, dtype=torch.float64))
    steps.copy_(steps.roll(1))
    graph.replay()
    expected, expected_probs = sample_rows_reference(
        logits,
        row_stats(logits, temperatures),
        temperatures,
        coins,
        steps=steps,
        is_greedy=on_gpu["is_greedy"],
        draft_logits=drafts,
        draft_stats=row_stats(drafts, temperatures, steps=steps),
        draft_steps=steps,
        draft_tokens=None,
    )
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(probs, expected_probs, rtol=1e-5, atol=1e-9)
