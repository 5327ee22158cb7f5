"""Device memory that SPARSESPEC takes beside the KV pool, by purpose, before any of it is allocated.

Sizes follow from shapes and options alone. What is held for good is subtracted from the KV pool; what is held for a
moment at a time shares the memory that the host leaves free for a prefill's activations, which never runs meanwhile.
Invariant: a larger pool never needs less memory beside it, so a bound for a larger pool serves for a smaller one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.ops._launch import MAX_SPLITS, WAVES, num_row_tiles, num_select_programs
from sglang_sparsespec.speculation.chunked import CHUNK_ELEMENTS
from sglang_sparsespec.speculation.distribution import MAX_TOP_K
from sglang_sparsespec.speculation.phases import load_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

GIB = 1 << 30
# scores that wait for a selection: whole layers, at most this, at least one
SCORE_BYTES = 128 << 20
# laying out slots takes the layers in groups of at most so many bytes, and so many for each slot while it does
LAYOUT_BYTES = 64 << 20
LAYOUT_ENTRY_BYTES = 24
# a captured forward beyond its tensors: nodes, parameters, rounding of small blocks, what warm-ups leave. On an H100,
# 46 graphs of a 30-layer model took 3.5 MiB each. The log shows after capture what graphs really took
GRAPH_BYTES = 4 << 20
# bytes that an acceptance holds for each probability of a chunk: itself, what it is computed from, a filter's sort (30)
ACCEPT_ELEMENT_BYTES = 38
# and for each rank of a row where filters become floors: logit, index, probability, mass, cumulative mass, masks
RANK_BYTES = 40
# bytes that a sparse verify holds for each place of a list: its position, slot, both as indices while they are made,
# and its score and the column that goes to; computed, not measured
LIST_ENTRY_BYTES = 48
# rows that an expert's own are padded to where the host's kernel sorts them by expert: its largest tile
EXPERT_TILE_ROWS = 128
# a row of the host's page table is longer than the context by what a decode step reserves, in whole pages; a bound
PAGE_TABLE_MARGIN = 64
# of what the host leaves free for activations, the share that moments of a round may count on; the rest is for
# workspaces that it allocates after it has sized the pool. Arbitrary
ACTIVATION_SHARE = 0.5


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What some tensors take, to compare with a plan."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ModelShape(NamedTuple):
    """The served model, as one rank sees it."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Of the whole vocabulary: logits are gathered."""
    dtype_bytes: int
    """Of weights and activations."""
    num_ranks: int = 1
    experts: int = 0
    """Of a layer; 0: dense."""
    experts_per_token: int = 0
    expert_size: int = 0
    """Width of an expert, this rank's part."""


class RoundShape(NamedTuple):
    """The rounds that a server runs."""

    max_reqs: int
    num_steps: int
    """k."""
    tail: int
    """Most positions between a selection and the last draft."""
    max_budget: int
    """Tokens that a request may select at most; 0 where selections are not stored."""
    context_len: int
    batch_sizes: tuple[int, ...]
    """That are captured; empty: rounds run eagerly."""
    is_fused: bool
    """Whether our own kernel verifies."""
    needs_scores: bool
    """Whether selections come from attention."""
    shares_heads: bool
    samples_drafts: bool
    logits_bytes: int
    """Of an element of logits, which drafts keep theirs of."""
    num_sms: int
    """Multiprocessors of the device."""
    narrower: tuple[int, ...] = ()
    """Widths of a verify, in tokens of a request, that are captured beside k + 1."""
    num_guesses: int = 0
    """Of a draft forward and request; 0: none."""
    sparse_list_len: int = 0
    """Places of what a KV head reads in a sparse verify; 0: verifies are dense."""
    staging_bytes: int = 0
    """Of KV on its way to host memory or back."""
    num_kv_blocks: int = 0
    """Blocks that a sparse verify scores in the longest context."""
    has_both_verifies: bool = False
    """Whether dense verifies are captured beside sparse ones."""
    is_unified: bool = False
    """Whether mixed forwards are captured as well, and drafts are kept from round to round."""
    has_plain: bool = False
    """Whether plain decodes are captured as well."""
    drops_channels: bool = False
    """Whether a verify drops channels of feed-forward layers."""

    @property
    def width(self) -> int:
        """Tokens that a request verifies: k + 1."""
        return self.num_steps + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one device, beside the KV pool."""

    selection: int
    """The selections in force, by page-table row."""
    round: int
    """Static inputs of drafts and verifies, above all the slots that drafts read."""
    scores: int
    """Scores of a fused verify until a selection is made; grows with the pool up to a bound."""
    drafts: int
    """Draft distributions, kept until acceptance."""
    forward: int
    """Activations, logits, split results and scratch of captured forwards, which keep theirs for good."""
    graphs: int
    """The graphs themselves."""
    moments: int
    """The most that anything else holds at a time: acceptance, laying out slots, a forward that is not captured."""

    @property
    def total(self) -> int:
        """Held as long as the server runs."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self)) - self.moments

    @property
    def captured(self) -> int:
        """What a capture adds: the graphs and what their forwards keep."""
        return self.forward + self.graphs

    def from_pool(self, activation_bytes: int) -> int:
        """What to subtract from a pool beside which the host leaves `activation_bytes` free."""
        return self.total + max(0, self.moments - int(ACTIVATION_SHARE * activation_bytes))

    def describe(self) -> str:
        """One line for the log, in GiB."""
        held = ", ".join(
            f"{field.name}{' (reserved)' if field.name in ('forward', 'graphs') else ''} "
            f"{getattr(self, field.name) / GIB:.3f}"
            for field in dataclasses.fields(self)
            if field.name != "moments"
        )
        return f"{self.total / GIB:.2f} GiB beside the KV pool: {held}; {self.moments / GIB:.2f} GiB at moments"


def num_score_layers(num_layers: int, num_kv_heads: int, num_columns: int) -> int:
    """Layers whose scores wait for one selection, where a layer has `num_columns` positions."""
    return min(num_layers, max(1, SCORE_BYTES // (4 * num_kv_heads * max(1, num_columns))))


def plan_memory(model: ModelShape, rounds: RoundShape, num_tokens: int) -> MemoryPlan:
    """What a server takes beside a pool of `num_tokens` tokens."""
    num_reqs, width, budget = rounds.max_reqs, rounds.width, rounds.max_budget
    num_lists = 1 if rounds.shares_heads else model.num_kv_heads
    captured_reqs = max(rounds.batch_sizes, default=0)
    # what is kept from round to round is kept by page-table row, of which one is padding
    num_rows = num_reqs + rounds.is_unified
    distributions = num_rows * rounds.num_steps * model.vocab_size * rounds.logits_bytes
    # of all requests at once, beyond the captured sizes and in warm-ups
    eager = _forward_bytes(model, rounds, num_reqs, num_tokens)
    capture = _capture_bytes(model, rounds)
    if not rounds.is_fused:
        eager += capture
    return MemoryPlan(
        # positions; then how many and until where. One row more than requests: padding
        selection=4 * (num_reqs + 1) * (model.num_layers * num_lists * budget + 2),
        # slots, by row; rows, tokens, position and slot of a step; positions, slots and chain of a round; lengths
        round=(num_reqs + 1) * 4 * model.num_layers * num_lists * (budget + rounds.tail)
        + num_reqs * (8 * (4 + 3 * width) + 4 * 3)
        + _unified_bytes(rounds)
        + _guess_bytes(rounds)
        + rounds.staging_bytes,
        scores=_score_bytes(model, rounds, num_tokens),
        drafts=distributions if rounds.samples_drafts else 0,
        forward=_forward_bytes(model, rounds, captured_reqs, num_tokens),
        # what forwards keep they share, and the widest comes first
        graphs=_num_forwards(rounds) * len(rounds.batch_sizes) * GRAPH_BYTES,
        moments=max(eager, _accept_bytes(model, rounds), _layout_bytes(model, rounds), capture, _lookup_bytes(rounds)),
    )


def _unified_bytes(rounds: RoundShape) -> int:
    """Chains and lengths by row, and the inputs of a mixed forward: row and offset of each token, row and queries of
    each verify."""
    if not rounds.is_unified:
        return 0
    load = load_of(rounds.max_reqs, rounds.num_steps)
    inputs = 2 * (load.num_tokens + load.verify_reqs)
    return (rounds.max_reqs + 1) * (4 + 8 + 8 * rounds.width) + 8 * inputs


def _num_forwards(rounds: RoundShape) -> int:
    """Kinds of forwards that are captured at each size: a draft, a verify of each width, and what options add."""
    verifies = (1 + len(rounds.narrower)) * (1 + rounds.has_both_verifies)
    return 1 + verifies + rounds.is_unified + (rounds.num_guesses > 0) + rounds.has_plain


def _guess_bytes(rounds: RoundShape) -> int:
    """Tokens by page-table row and position, and the inputs of a draft forward with guesses."""
    if rounds.num_guesses == 0:
        return 0
    history = 4 * (rounds.max_reqs + 1) * (rounds.context_len + 4 * rounds.width + PAGE_TABLE_MARGIN)
    return history + rounds.max_reqs * (rounds.num_guesses + 1) * (4 * 8 + 4)


def _lookup_bytes(rounds: RoundShape) -> int:
    """Of an n-gram lookup over all text: tokens, three masks, and match lengths while they are ranked."""
    return (4 + 3 + 3 * 8) * rounds.max_reqs * rounds.context_len if rounds.num_guesses else 0


def fit_pool(
    model: ModelShape,
    rounds: RoundShape,
    *,
    pool_bytes: int,
    activation_bytes: int,
    tokens_in: Callable[[int], int],
) -> int:
    """How many of `pool_bytes` are left for KV.

    Args:
        model: what is served.
        rounds: how.
        pool_bytes: what the host would take for its pool.
        activation_bytes: what it leaves free beside it.
        tokens_in: tokens of a pool of so many bytes.

    Raises:
        ConfigError: too little is left for a full batch.
    """
    plan = plan_memory(model, rounds, 0)
    left = pool_bytes - plan.from_pool(activation_bytes)
    # scores for more tokens than there will be, so that what remains is enough
    plan = plan_memory(model, rounds, tokens_in(max(0, left)))
    left = pool_bytes - plan.from_pool(activation_bytes)
    num_tokens = tokens_in(max(0, left))
    # what a host that looks one round ahead holds for a full batch; unified rounds write further
    num_rounds = 3 if rounds.is_unified else 2
    least = num_rounds * rounds.max_reqs * rounds.width
    if num_tokens < least:
        raise ConfigError(
            "The KV pool, in tokens,",
            num_tokens,
            f"at least {least}, {num_rounds} rounds of {rounds.max_reqs} requests",
            f"Weights and --mem-fraction-static leave {pool_bytes / GIB:.2f} GiB, of which SPARSESPEC needs "
            f"{plan.from_pool(activation_bytes) / GIB:.2f} ({plan.describe()}). Lower {_remedies(plan)}.",
        )
    return left


def _remedies(plan: MemoryPlan) -> str:
    """Options that make the plan smaller, the one that weighs most first."""
    options = {
        "--max-running-requests": plan.selection + plan.round + plan.drafts + plan.moments,
        "--cuda-graph-max-bs-decode": plan.captured,
    }
    first, second = sorted(options, key=lambda option: -options[option])
    return f"{first}, {second} or --speculative-num-steps"


def _score_bytes(model: ModelShape, rounds: RoundShape, num_tokens: int) -> int:
    """A bound that grows with the pool; the buffer itself has whole layers only and is up to a layer smaller."""
    if not (rounds.is_fused and rounds.needs_scores):
        return 0
    layer = 4 * model.num_kv_heads * num_tokens
    return min(model.num_layers * layer, max(SCORE_BYTES, layer))


def _forward_bytes(model: ModelShape, rounds: RoundShape, num_reqs: int, num_tokens: int) -> int:
    """A verify of `num_reqs` requests; a draft step of as many needs less, and shares it."""
    if num_reqs == 0:
        return 0
    num_rows = num_reqs * rounds.width
    # the residual and what is normed; then Q, K, V and the output, or both halves and their product
    attention = (2 * model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
    # which channels are small is found beside them, and the others are copied
    channels = (6 if rounds.drops_channels else 3) * model.intermediate_size
    layer = max(num_rows * max(attention, channels), _expert_elements(model, num_rows, rounds.drops_channels))
    activations = 2 * num_rows * model.hidden_size + layer
    # the head's product; where ranks gather also this rank's part of it, and all parts before they stand in order
    head = model.vocab_size + (model.vocab_size + model.vocab_size // model.num_ranks if model.num_ranks > 1 else 0)
    kernels = _split_bytes(model, rounds, num_reqs)
    kernels += _list_bytes(model, rounds, num_reqs)
    if rounds.is_fused and rounds.needs_scores:
        kernels += _plane_bytes(model, rounds, num_tokens) + _select_bytes(model, rounds, num_reqs)
    widened = model.vocab_size * rounds.logits_bytes if rounds.logits_bytes > model.dtype_bytes else 0
    return (activations + num_rows * head) * model.dtype_bytes + num_rows * widened + kernels


def _expert_elements(model: ModelShape, num_rows: int, drops_channels: bool) -> int:
    """What the experts of one layer hold at a time, as the host's Triton kernels run them.

    The router's logits and choices; then, for each row and expert of it, both halves and their product, and after them
    the product and the expert's output. Rows of an expert may be padded to a whole tile. Which channels are small is
    found beside both halves and their product.
    """
    if model.experts == 0:
        return 0
    pairs = num_rows * model.experts_per_token
    pairs += min(pairs, model.experts + 1) * (EXPERT_TILE_ROWS - 1)
    # a weight and an index of 4 bytes, and the row's place among those of its expert: at most 6 elements of 2
    routing = num_rows * model.experts + 6 * pairs
    halves = (4 if drops_channels else 2) * model.expert_size
    return routing + pairs * (model.expert_size + max(halves, model.hidden_size))


def _split_bytes(model: ModelShape, rounds: RoundShape, num_reqs: int) -> int:
    """Partial outputs and their log-sum-exp, float32, of the verify kernel or of sparse decode."""
    group = model.num_q_heads // model.num_kv_heads
    lists = num_reqs * model.num_kv_heads

    def split(num_rows: int, row_tiles: int) -> int:
        # programs are split until there are WAVES per multiprocessor, never beyond; unsplit, no partial output
        shares = min(MAX_SPLITS * lists, WAVES * rounds.num_sms // row_tiles)
        return 4 * num_rows * (shares * (model.head_dim + 1) + lists)

    # a narrower verify may have fewer tiles, and so more splits
    rows = [width * group for width in (rounds.width, *rounds.narrower)] if rounds.is_fused else []
    verify = [split(num_rows, num_row_tiles(num_rows)) for num_rows in rows]
    # a mixed forward runs both, one after the other
    return split(group, 1) + max(verify) if rounds.is_unified else max([split(group, 1), *verify])


def _list_bytes(model: ModelShape, rounds: RoundShape, num_reqs: int) -> int:
    """Of a sparse verify: what KV heads read, scores of blocks and their choice, and queries and output by head."""
    if rounds.sparse_list_len == 0:
        return 0
    num_lists = num_reqs * model.num_kv_heads
    row_tiles = num_row_tiles(rounds.width * (model.num_q_heads // model.num_kv_heads))
    # each tile of query rows has its own scores where there are several
    entry = LIST_ENTRY_BYTES + (4 * row_tiles if rounds.needs_scores and row_tiles > 1 else 0)
    lists = entry * num_lists * rounds.sparse_list_len
    programs = num_select_programs(num_lists, rounds.num_kv_blocks, rounds.num_sms)
    choice = 4 * num_lists * rounds.num_kv_blocks + 8 * rounds.num_kv_blocks * programs
    by_head = 2 * num_reqs * rounds.width * model.num_q_heads * model.head_dim * model.dtype_bytes
    return lists + choice + by_head


def _plane_bytes(model: ModelShape, rounds: RoundShape, num_tokens: int) -> int:
    """Scores by tile of query rows, where there is more than one tile."""
    row_tiles = num_row_tiles(rounds.width * (model.num_q_heads // model.num_kv_heads))
    return 4 * row_tiles * model.num_kv_heads * num_tokens if row_tiles > 1 else 0


def _select_bytes(model: ModelShape, rounds: RoundShape, num_reqs: int) -> int:
    """Scratch and result of a selection, as if for all layers: how many wait falls as the pool grows."""
    num_rows = model.num_layers * num_reqs * (1 if rounds.shares_heads else model.num_kv_heads)
    programs = num_select_programs(num_rows, rounds.context_len, rounds.num_sms)
    return 8 * rounds.context_len * programs + 4 * num_rows * rounds.max_budget


def _accept_bytes(model: ModelShape, rounds: RoundShape) -> int:
    """Distributions of some requests, beside all logits in float32 as penalties, grammars and logit bias need them.

    That is where filters need a sort. Where they become floors it is the best few of each row and a copy of one row
    per request. Without filters a GPU needs only the logits; but any request may ask for either.
    """
    request = rounds.width * model.vocab_size
    elements = min(rounds.max_reqs * request, max(CHUNK_ELEMENTS, request))
    num_ranks = min(MAX_TOP_K, model.vocab_size)
    floors = rounds.max_reqs * (4 * model.vocab_size + RANK_BYTES * rounds.width * num_ranks)
    # where a round verifies in groups, the logits of all stand beside the forward's own
    gathered = rounds.logits_bytes if rounds.is_fused else 0
    return (4 + gathered) * rounds.max_reqs * request + max(ACCEPT_ELEMENT_BYTES * elements, floors)


def _layout_bytes(model: ModelShape, rounds: RoundShape) -> int:
    """The slots of a round before they are where drafts look for them."""
    num_lists = 1 if rounds.shares_heads else model.num_kv_heads
    layer = rounds.max_reqs * num_lists * (rounds.max_budget + rounds.tail)
    step = LAYOUT_ENTRY_BYTES * layer
    return 4 * model.num_layers * layer + min(model.num_layers * step, max(LAYOUT_BYTES, step))


def _capture_bytes(model: ModelShape, rounds: RoundShape) -> int:
    """Scores of one layer beside a dense verify or at the end of a prompt, some requests at a time."""
    request = 4 * model.num_kv_heads * rounds.context_len
    if rounds.max_budget == 0:
        # a policy that selects for every draft step scores all requests at once
        return rounds.max_reqs * request
    if rounds.is_fused:
        # behind a prefill: how new each position is, the same as keys, and what of it is kept
        return 3 * 4 * rounds.max_reqs * rounds.context_len
    if not rounds.needs_scores:
        return 0
    scores = min(rounds.max_reqs * request, max(SCORE_BYTES, request))
    return scores + _select_bytes(model, rounds, rounds.max_reqs)
