"""The target's sampling distribution, and one token from a distribution.

Acceptance is lossless only with respect to the distribution it is given, so `target_probs` is the one from which SGLang
would have sampled without speculation: temperature, then top-k, top-p and min-p by the rule of the host's backend.
Knows nothing of drafts. Invariant: a row with top_k <= 1 is one-hot, so greedy requests need no path of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# Rows are filtered in chunks: a sort needs about 30 bytes per element. 2**24 elements are 110 rows of a 152K
# vocabulary, and enough to fill a GPU.
_CHUNK_ELEMENTS = 1 << 24
# Requests that filter ask for tens; past this bound a top-k is not known to beat a sort.
MAX_TOP_K = 1024
# tokens per block of the two-level search in `sample`; about sqrt(152K), rounded up to a power of two
_BLOCK = 512


def target_probs(
    logits: Tensor,
    *,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    need_top_k: bool,
    need_top_p: bool,
    need_min_p: bool,
    filter_order: Literal["joint", "sequential"] = "joint",
    ties: Literal["first", "all"] = "first",
    max_top_k: int | None = None,
    has_greedy: bool = True,
) -> Tensor:
    """The distribution from which SGLang samples the next token when it does not speculate.

    A token is kept when it ranks below `top_k`, the mass ranked above it is at most `top_p`, and its probability is at
    least `min_p` times the largest. The kept probabilities are normalised.

    Args:
        logits: [num_rows, vocab_size], floating, after penalties, grammar and logit bias; not changed.
        temperatures: [num_rows, 1], float32, positive.
        top_ks: [num_rows], int32. A row with top_k <= 1 is greedy: one-hot at the argmax, the lowest index among ties.
        top_ps, min_ps: [num_rows], float32, in [0, 1].
        need_top_k, need_top_p, need_min_p: known on the host; a filter that no row needs is skipped.
        filter_order: "joint": `top_p` bounds the mass before filtering (SGLang's torch backend; FlashInfer without
            min_p). "sequential": the mass after top-k (SGLang's FlashInfer backend when a row of the batch has min_p).
        ties: which of several equal probabilities at the last kept rank survive. "first": the lowest token ids, as a
            stable sort would (torch backend). "all": all of them, beyond `top_k` if need be (FlashInfer's kernels).
        max_top_k: host-side bound on `top_ks` of every row, if there is one. Replaces the sort by a top-k, which costs
            a fraction of it.
        has_greedy: known on the host: whether any row may be greedy.

    Returns:
        [num_rows, vocab_size], float32; each row sums to 1.

    Not checked: that each row has a finite logit and no NaN; that `max_top_k` bounds `top_ks`; that no row is greedy
    where `has_greedy` is False.
    Reference: sglang.srt.layers.sampler, top_k_top_p_min_p_sampling_from_probs_torch and Sampler._sample_from_probs.
    """
    # the division widens what is narrower: float32 logits are never made
    probs = torch.softmax(logits / temperatures, dim=-1, dtype=torch.float32)
    if need_top_k or need_top_p or need_min_p:
        for rows in chunks(probs.shape[0], probs.shape[1], _CHUNK_ELEMENTS):
            _filter(
                probs[rows],
                top_ks=top_ks[rows] if need_top_k else None,
                top_ps=top_ps[rows] if need_top_p else None,
                min_ps=min_ps[rows] if need_min_p else None,
                sequential=filter_order == "sequential",
                keep_ties=ties == "all",
                max_top_k=max_top_k if need_top_k else None,
            )
    return _make_greedy_rows_one_hot(probs, logits, top_ks <= 1) if has_greedy else probs


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How each request of a batch samples: what `target_probs` takes beside logits, one row per request."""

    temperatures: Tensor
    """[num_reqs, 1], float32."""
    top_ks: Tensor
    """[num_reqs], int32."""
    top_ps: Tensor
    """[num_reqs], float32."""
    min_ps: Tensor
    """[num_reqs], float32."""
    need_top_k: bool
    need_top_p: bool
    need_min_p: bool
    filter_order: Literal["joint", "sequential"] = "joint"
    ties: Literal["first", "all"] = "first"
    max_top_k: int | None = None
    has_greedy: bool = True

    @property
    def is_filtered(self) -> bool:
        """Whether any request drops tokens; one-hot rows of greedy requests apart."""
        return self.need_top_k or self.need_top_p or self.need_min_p

    @property
    def has_floors(self) -> bool:
        """Whether what the filters keep of a row is all logits from some value on, found among its best few."""
        return self.need_top_k and self.max_top_k is not None and self.ties == "all"

    def of(self, reqs: slice | Tensor) -> SamplingRule:
        """The rule of some of the requests, which may be named by their numbers."""
        return self._each(lambda values: values[reqs])

    def probs(self, logits: Tensor) -> Tensor:
        """The distributions that the requests sample from.

        Args:
            logits: [num_reqs, vocab_size], or [num_reqs, num_positions, vocab_size]; not changed.

        Returns:
            float32, shaped like `logits`.
        """
        num_positions = logits.shape[1] if logits.dim() == 3 else 1

        def per_row(values: Tensor) -> Tensor:
            return values.unsqueeze(1).expand(-1, num_positions, *values.shape[1:]).flatten(0, 1)

        # the fields are its arguments
        return target_probs(logits.flatten(0, -2), **vars(self._each(per_row))).view(logits.shape)

    def _each(self, change: Callable[[Tensor], Tensor]) -> SamplingRule:
        """The same with every tensor changed."""
        return dataclasses.replace(
            self,
            temperatures=change(self.temperatures),
            top_ks=change(self.top_ks),
            top_ps=change(self.top_ps),
            min_ps=change(self.min_ps),
        )


def sample(probs: Tensor, coins: Tensor) -> Tensor:
    """The token at which the cumulative distribution of each row passes its coin.

    Args:
        probs: [num_rows, vocab_size], float32, non-negative; need not be normalised.
        coins: [num_rows], float32 or float64, in [0, 1). A float32 coin resolves probabilities down to 2**-24.

    Returns:
        [num_rows], int64. Never a token of probability 0, unless the whole row is 0.

    Sums are taken in float64 and in two levels (blocks of the vocabulary, then the block hit), so the probabilities are
    read once and a vocabulary-sized cumulative sum is never written.
    """
    vocab_size = probs.shape[1]
    whole = vocab_size // _BLOCK * _BLOCK
    block_mass = torch.cat(
        [
            probs[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(dim=-1, dtype=torch.float64),
            probs[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64),
        ],
        dim=1,
    )
    block_cdf = block_mass.cumsum(dim=1)
    target_mass = coins.to(torch.float64).unsqueeze(1) * block_cdf[:, -1:]
    # first block whose cumulative mass exceeds the coin, so it has mass; a rounded-up coin gets the heaviest block
    block = torch.searchsorted(block_cdf, target_mass, right=True).clamp(max=block_cdf.shape[1] - 1)
    block = torch.where(block_mass.gather(1, block) > 0, block, block_mass.argmax(dim=1, keepdim=True))

    width = min(_BLOCK, vocab_size)
    tokens = block * _BLOCK + torch.arange(width, device=probs.device)
    inside = tokens < vocab_size
    mass = probs.gather(1, tokens.clamp(max=vocab_size - 1)).to(torch.float64) * inside
    mass_before = block_cdf.gather(1, block) - block_mass.gather(1, block)
    mass_within = (target_mass - mass_before).clamp(min=0.0)
    offset = torch.searchsorted(mass.cumsum(dim=1), mass_within, right=True).clamp(max=width - 1)
    # the two levels round differently: the coin may fall behind the block's last token
    offset = torch.where(mass.gather(1, offset) > 0, offset, mass.argmax(dim=1, keepdim=True))
    return (block * _BLOCK + offset).squeeze(1)


def chunks(num_rows: int, row_elements: int, max_elements: int) -> Iterator[slice]:
    """As many rows at a time as have `max_elements` together, at least one."""
    step = max(1, max_elements // row_elements)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _filter(
    probs: Tensor,
    *,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    sequential: bool,
    keep_ties: bool,
    max_top_k: int | None,
) -> None:
    """Zero what the filters drop and normalise, in place."""
    keep = torch.ones_like(probs, dtype=torch.bool)
    if min_ps is not None:
        keep = probs >= probs.amax(dim=-1, keepdim=True) * min_ps.unsqueeze(1)
    if top_ks is not None or top_ps is not None:
        keep &= _keep_top(probs, top_ks, top_ps, sequential=sequential, keep_ties=keep_ties, max_top_k=max_top_k)
    probs.masked_fill_(~keep, 0.0)
    probs.div_(probs.sum(dim=-1, keepdim=True))


def _keep_top(
    probs: Tensor,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    *,
    sequential: bool,
    keep_ties: bool,
    max_top_k: int | None,
) -> Tensor:
    """Which tokens top-k and top-p keep, [num_rows, vocab_size] bool."""
    if max_top_k is not None and max_top_k < probs.shape[1]:
        ranked = probs.topk(max(1, max_top_k), dim=-1).values
    else:
        ranked = probs.sort(dim=-1, descending=True).values
    num_kept = num_ranks_kept(
        ranked,
        None if top_ks is None else top_ks.unsqueeze(1),
        None if top_ps is None else top_ps.unsqueeze(1),
        sequential=sequential,
    )
    last_kept = ranked.gather(1, num_kept - 1)
    if keep_ties:
        return probs >= last_kept
    num_above = (ranked > last_kept).sum(dim=-1, keepdim=True)
    tied = probs == last_kept
    tie_rank = tied.cumsum(dim=-1, dtype=torch.int32)  # 1 for the first of the tied
    return (probs > last_kept) | (tied & (tie_rank <= num_kept - num_above))


def num_ranks_kept(ranked: Tensor, top_ks: Tensor | None, top_ps: Tensor | None, *, sequential: bool) -> Tensor:
    """How many of the highest probabilities top-k and top-p keep, ties at the last apart.

    Args:
        ranked: [..., num_ranks], float32, descending.
        top_ks, top_ps: [..., 1], or None for a filter that is not needed.
        sequential: as in `target_probs`.

    Returns:
        [..., 1], int64, at least 1.
    """
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_ks is not None:
        kept = kept & (torch.arange(ranked.shape[-1], device=ranked.device) < top_ks)
    if top_ps is not None:
        ranked_mass = ranked
        if sequential:
            ranked_mass = ranked * kept
            ranked_mass /= ranked_mass.sum(dim=-1, keepdim=True)
        kept &= ranked_mass.cumsum(dim=-1) - ranked_mass <= top_ps
    # ranks are kept from the top down to the first one dropped, and the first rank always
    return kept.to(torch.int32).cumprod(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1)


def _make_greedy_rows_one_hot(probs: Tensor, logits: Tensor, is_greedy: Tensor) -> Tensor:
    """One-hot rows at the argmax of the raw logits: dividing by a temperature can merge neighbouring logits."""
    probs.masked_fill_(is_greedy.unsqueeze(1), 0.0)
    best = logits.argmax(dim=-1, keepdim=True)
    return probs.scatter_add_(1, best, is_greedy.unsqueeze(1).to(probs.dtype))
