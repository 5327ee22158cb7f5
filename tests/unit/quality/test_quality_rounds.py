"""Emulated sparse verifies against the dense model, against transformers, and against what they may not read."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_sparsespec.acceptance.model import PagedModel
from sglang_sparsespec.acceptance.rounds import prefill
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.quality.calibrate import median_expert_ratios, similarity
from sglang_sparsespec.quality.measure import Workload, baseline, measure
from sglang_sparsespec.quality.rounds import VerifyRound
from sglang_sparsespec.quality.rules import routers
from sglang_sparsespec.quality.settings import Setting
from sglang_sparsespec.quality.walk import Requests, Verifier
from sglang_sparsespec.sparsity.anchors_file import Calibration, write_anchors

if TYPE_CHECKING:
    from pathlib import Path

LENS = [150, 97]
AHEAD = 12
SPARSE: dict[str, Any] = {"num_steps": 3, "attention_ratio": 0.1, "dense_below": 32, "block_size": 8}


def load(path: Path) -> tuple[PagedModel, Requests, torch.Tensor, list[list[int]]]:
    """Model, prompts in its pool, [2, AHEAD + 1] tokens behind them, and all tokens."""
    rng = random.Random(3)
    windows = [[rng.randrange(256) for _ in range(n + AHEAD + 1)] for n in LENS]
    model = PagedModel(path, device="cpu", dtype=torch.float32)
    model.allocate(len(LENS), max(LENS) + 40)
    found = prefill(model, [window[:n] for window, n in zip(windows, LENS, strict=True)], keep=1)
    requests = Requests(range(2), found.lens, found.next_logits.argmax(-1))
    ahead = torch.tensor([window[n:] for window, n in zip(windows, LENS, strict=True)])
    return model, requests, ahead, windows


def walk(model: PagedModel, setting: Setting, requests: Requests, ahead: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(Verifier(model, setting).along(requests, ahead[:, :-1])), dim=1)


@pytest.fixture(params=["qwen3", "llama", "qwen3-moe", "mixtral"])
def path(request: pytest.FixtureRequest, tiny_moe_paths: dict[str, Path]) -> Path:
    if request.param in tiny_moe_paths:
        return tiny_moe_paths[request.param]
    return request.getfixturevalue(f"tiny_{request.param}_path")


def test_dense_rounds_are_the_model(path: Path) -> None:
    """A baseline that is not the model's own forward makes every loss meaningless."""
    model, requests, ahead, windows = load(path)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    found = walk(model, Setting(num_steps=3), requests, ahead)
    for row, window in enumerate(windows):
        with torch.no_grad():
            expected = reference(torch.tensor([window[:-1]])).logits[0, -AHEAD:]
        torch.testing.assert_close(found[row], expected, atol=2e-3, rtol=1e-3)


def test_nothing_left_out_is_dense_to_the_bit(path: Path) -> None:
    """The dense limit: contexts below L0, and a ratio whose blocks, rounded up, are all there are."""
    model, requests, ahead, _ = load(path)
    dense = walk(model, Setting(num_steps=3), requests, ahead)
    for limits in ({"dense_below": 4096}, {"dense_below": 0, "attention_ratio": 0.999, "block_size": 64}):
        limit = Setting(**{**SPARSE, **limits})
        assert torch.equal(walk(model, limit, requests, ahead), dense)
    # the comparison can fail
    assert not torch.equal(walk(model, Setting(**SPARSE), requests, ahead), dense)


def test_dense_limit_loses_nothing(tiny_qwen3_path: Path) -> None:
    """KL that is merely small, or agreement short of all, would hide the loss of a mild setting."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    work = Workload(texts=requests, ahead=ahead, haystacks=None, hidden=[], own_tokens=20)
    base = baseline(model, Setting(num_steps=3), work)
    limit = measure(model, Setting(num_steps=3, attention_ratio=0.1, dense_below=4096), work, base)
    assert limit.kl == [0.0, 0.0]
    assert limit.agreement == [1.0, 1.0]
    assert limit.nll_excess == [0.0, 0.0]
    assert limit.equal_prefix == [20, 20]
    assert limit.read_share == limit.channels_kept == limit.experts_kept == 1.0
    sparse = measure(model, Setting(**SPARSE), work, base)
    assert min(sparse.kl) > 0
    assert min(sparse.agreement) < 1
    assert min(sparse.equal_prefix) < 20
    # three rounds along the text, and five that write 19 tokens behind the prefill's
    contexts = [n + start for n in LENS for start in (0, 4, 8, 0, 4, 8, 12, 16)]
    # floor((n - 32) / 10) + 32 tokens, in blocks of 8, of which the last one may be cut short
    shares = [(-(-((n - 32) // 10 + 32) // 8) * 8 - -n % 8) / n for n in contexts]
    assert sparse.read_share == pytest.approx(sum(shares) / len(shares))


def test_kl_and_perplexity_are_those_of_torch(tiny_qwen3_path: Path) -> None:
    """KL the other way round, or targets one off, looks just as plausible."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    work = Workload(texts=requests, ahead=ahead, haystacks=None, hidden=[], own_tokens=2)
    base = baseline(model, Setting(num_steps=3), work)
    found = measure(model, Setting(**SPARSE), work, base)
    sparse, dense = walk(model, Setting(**SPARSE), requests, ahead), torch.cat(base.logits, dim=1)
    for row in range(2):
        mine, theirs = sparse[row].log_softmax(-1), dense[row].log_softmax(-1)
        kl = torch.nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        assert found.kl[row] == pytest.approx(kl.item(), rel=1e-4)
        nll = torch.nn.functional.cross_entropy(sparse[row], ahead[row, 1:])
        assert found.nll[row] == pytest.approx(nll.item(), rel=1e-5)


def test_what_is_left_out_is_not_read(tiny_qwen3_path: Path) -> None:
    """After the first token has chosen, all else of the committed KV may turn into anything."""

    def rest_of_round(*, scramble: bool) -> torch.Tensor:
        model, requests, ahead, _ = load(tiny_qwen3_path)
        verify = VerifyRound(model, requests.rows, requests.lens, range(3), ratio=0.1, dense_below=32, block_size=8)
        positions = requests.lens[:, None] + torch.arange(5)
        verify.feed(ahead[:, :1], positions[:, :1])
        for layer, kept in verify.kept.items() if scramble else ():
            for pool in (model.k_pool, model.v_pool):
                by_row = pool[layer].view(2, -1, *pool[layer].shape[1:])
                for row, length in enumerate(LENS):
                    seen = kept[row].repeat_interleave(8, dim=1)[:, :length].T
                    by_row[row, :length][~seen] = 7.0
                    assert seen.sum(0).max() < length
        return verify.feed(ahead[:, 1:5], positions[:, 1:])

    assert torch.equal(rest_of_round(scramble=True), rest_of_round(scramble=False))


def test_token_by_token_is_the_same_round(tiny_qwen3_path: Path) -> None:
    """Greedy output is written token by token; the blocks are the first token's all the same."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    positions = requests.lens[:, None] + torch.arange(4)
    options = {"ratio": 0.1, "dense_below": 32, "block_size": 8}
    together = VerifyRound(model, requests.rows, requests.lens, range(3), **options)
    at_once = together.feed(ahead[:, :4], positions)
    alone = VerifyRound(model, requests.rows, requests.lens, range(3), **options)
    steps = [alone.feed(ahead[:, i : i + 1], positions[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(alone.kept[layer], together.kept[layer]) for layer in range(3))


def test_layers_read_what_their_anchor_chose(tiny_qwen3_path: Path, tmp_path: Path) -> None:
    """An anchors file that is read and has no effect; one of another model or block size is refused."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    config = model.model.config.to_dict()
    few, every = str(tmp_path / "few.json"), str(tmp_path / "every.json")
    write_anchors(few, model=config, block_size=8, anchors=(0, 2))
    write_anchors(every, model=config, block_size=8, anchors=(0, 1, 2))
    alone = walk(model, Setting(**SPARSE), requests, ahead)
    assert torch.equal(walk(model, Setting(**SPARSE, anchors=every), requests, ahead), alone)
    assert not torch.equal(walk(model, Setting(**SPARSE, anchors=few), requests, ahead), alone)
    verify = VerifyRound(model, requests.rows, requests.lens, (0, 0, 2), ratio=0.1, dense_below=32, block_size=8)
    verify.feed(ahead[:, :2], requests.lens[:, None] + torch.arange(2))
    assert sorted(verify.kept) == [0, 2]
    with pytest.raises(ConfigError, match="block_size"):
        Verifier(model, Setting(**{**SPARSE, "block_size": 16}, anchors=every))
    other = Calibration(weights="0" * 16, ratio=0.1, dense_below=32)
    write_anchors(every, model=config, block_size=8, anchors=(0, 1, 2), calibration=other)
    with pytest.raises(ConfigError, match="its weights"):
        Verifier(model, Setting(**SPARSE, anchors=every))


def test_each_nth_round_is_dense(tiny_qwen3_path: Path) -> None:
    """Only what it computes itself is dense: the KV of the rounds before stays as they left it."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    verifier = Verifier(model, Setting(**SPARSE, dense_every=3, ffn_threshold=0.1))
    list(verifier.along(requests, ahead[:, :-1]))
    assert verifier.dense_rounds == [False, False, True]
    assert verifier.read_shares[2] == 1.0
    assert max(verifier.read_shares[:2]) < 0.5
    kept = verifier.rules.kept_share("channels")
    assert verifier.kept_share("channels") == pytest.approx((2 * kept + 1) / 3)


def test_a_threshold_above_everything_drops_the_feed_forward_layers(tiny_qwen3_path: Path) -> None:
    """A hook at another place, or one that outlives its rounds."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    dense = walk(model, Setting(num_steps=3), requests, ahead)
    verifier = Verifier(model, Setting(num_steps=3, ffn_threshold=1e9))
    without = torch.cat(list(verifier.along(requests, ahead[:, :-1])), dim=1)
    assert verifier.kept_share("channels") == 0.0
    assert torch.equal(walk(model, Setting(num_steps=3), requests, ahead), dense)
    for name, weight in model.model.named_parameters():
        if name.endswith("down_proj.weight"):
            weight.data.zero_()
    torch.testing.assert_close(without, walk(model, Setting(num_steps=3), requests, ahead))


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_fewer_experts_are_a_model_with_fewer_experts(kind: str, tiny_moe_paths: dict[str, Path]) -> None:
    """Weights that no longer sum to one, or the wrong experts; all of them are the model itself."""
    model, requests, ahead, _ = load(tiny_moe_paths[kind])
    dense = walk(model, Setting(num_steps=3), requests, ahead)
    assert torch.equal(walk(model, Setting(num_steps=3, moe_top_k=4), requests, ahead), dense)
    assert torch.equal(walk(model, Setting(num_steps=3, moe_thresholds=(0.0,)), requests, ahead), dense)
    fewer = walk(model, Setting(num_steps=3, moe_top_k=2), requests, ahead)
    # thresholds that everything is below skip as many
    always = walk(model, Setting(num_steps=3, moe_thresholds=(1e9, 1e9)), requests, ahead)
    torch.testing.assert_close(always, fewer)
    for router in routers(model.model):
        router.top_k = 2
    torch.testing.assert_close(fewer, walk(model, Setting(num_steps=3), requests, ahead), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(fewer, dense, atol=1e-2)


def test_fewer_experts_keep_the_weights_of_a_router_that_does_not_normalise(tiny_moe_paths: dict[str, Path]) -> None:
    """Weights that grow to the old sum are another model than the server's, whose router just chooses fewer."""
    model, requests, ahead, _ = load(tiny_moe_paths["qwen3-moe"])
    for router in routers(model.model):
        router.norm_topk_prob = False
    fewer = walk(model, Setting(num_steps=3, moe_top_k=2), requests, ahead)
    for router in routers(model.model):
        router.top_k = 2
    torch.testing.assert_close(fewer, walk(model, Setting(num_steps=3), requests, ahead), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_channels_of_experts(kind: str, tiny_moe_paths: dict[str, Path]) -> None:
    """A threshold that nothing is below is the model; one that all are below leaves the experts out; in between it is
    each expert's own channels."""
    model, requests, ahead, _ = load(tiny_moe_paths[kind])
    dense = walk(model, Setting(num_steps=3), requests, ahead)
    found = walk(model, Setting(num_steps=3, ffn_threshold=1e-30), requests, ahead)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)
    some = Verifier(model, Setting(num_steps=3, ffn_threshold=0.05))
    between = torch.cat(list(some.along(requests, ahead[:, :-1])), dim=1)
    assert 0.05 < some.kept_share("channels") < 0.95
    assert not torch.allclose(between, dense, atol=1e-2)
    without = walk(model, Setting(num_steps=3, ffn_threshold=1e9), requests, ahead)
    assert torch.equal(walk(model, Setting(num_steps=3), requests, ahead), dense)
    for name, weight in model.model.named_parameters():
        if name.endswith("experts.down_proj"):
            weight.data.zero_()
    torch.testing.assert_close(without, walk(model, Setting(num_steps=3), requests, ahead), atol=1e-5, rtol=1e-5)


def test_rules_that_a_model_has_no_layers_for(tiny_qwen3_path: Path, tiny_moe_paths: dict[str, Path]) -> None:
    """A rule without effect would be reported as one without loss."""
    dense, moe = load(tiny_qwen3_path)[0], load(tiny_moe_paths["mixtral"])[0]
    for model, options, complaint in (
        (dense, {"moe_top_k": 2}, "without experts"),
        (dense, {"moe_thresholds": (0.1,)}, "without experts"),
        (moe, {"moe_top_k": 5}, "at most 4"),
        (moe, {"moe_thresholds": (0.1,) * 4}, "at most 3"),
        (moe, {"moe_thresholds": (0.1,), "moe_top_k": 2}, "rivals"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Verifier(model, Setting(**options))  # type: ignore[arg-type]


def test_similarity_is_found_on_dense_rounds(tiny_qwen3_path: Path) -> None:
    """Choices made on KV that sparse rounds wrote would calibrate another model."""
    model, requests, ahead, _ = load(tiny_qwen3_path)
    setting = Setting(**SPARSE)
    walk(model, Setting(num_steps=3), requests, ahead)
    before = [pool.clone() for pool in model.k_pool]
    found = similarity(model, setting, requests, ahead[:, :-1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.k_pool, strict=True))
    matrix = torch.tensor(found.matrix)
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1.0] * 3
    # first and last block alone make some similarity
    assert 0 < found.by_chance < 1
    assert found.at_distance(2) == found.matrix[0][2]
    assert found.num_rounds == AHEAD // 4


def test_medians_skip_half_of_the_tokens(tiny_moe_paths: dict[str, Path]) -> None:
    """The calibrated threshold of one expert skips it for half of the tokens of the same text."""
    model, requests, ahead, _ = load(tiny_moe_paths["qwen3-moe"])
    medians = median_expert_ratios(model, requests, ahead)
    assert medians == sorted(medians)
    assert len(medians) == 3
    assert routers(model.model)[0]._forward_hooks == {}
    verifier = Verifier(model, Setting(num_steps=AHEAD, moe_thresholds=(medians[0],)))
    list(verifier.along(requests, ahead))
    # one of four experts, for about half of the tokens: the first layer's choice changes what the second one sees
    assert verifier.kept_share("experts") == pytest.approx(1 - 0.5 / 4, abs=0.02)
