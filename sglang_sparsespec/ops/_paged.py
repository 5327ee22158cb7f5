"""Shared by the torch implementations: grouping requests of similar length and gathering their KV from the pool.

Host lengths are used where the tensors live on the host; on a device every length is replaced by its upper bound, so
nothing here waits for one. Invariant: a slot that no valid position names is never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

# transient bytes that one step of a torch implementation may hold. On CPU well below the 64 MiB that glibc keeps in a
# heap once a process has freed a block of 32 MiB: memory given back is faulted in anew, a third of the time of a verify
CPU_STEP_BYTES = 24 << 20
DEVICE_STEP_BYTES = 256 << 20
# positions to which a row's anchored scores are relative: the first ones (the sinks among them) and the newest
NUM_ANCHORS = 64
NUM_FIRST_ANCHORS = 16
# a group may pad its shortest member by a quarter, or by this many tokens, whichever is more
_PAD_RATIO = 0.8
_PAD_TOKENS = 64


class Group(NamedTuple):
    """Requests that are computed together, padded to the longest of them."""

    rows: list[int]
    num_queries: int
    kv_len: int


def group_requests(query_lens: list[int], kv_lens: list[int]) -> list[Group]:
    """Split requests into groups of similar (query_len, kv_len); those without queries are left out."""
    order = sorted((r for r in range(len(kv_lens)) if query_lens[r] > 0), key=lambda r: (query_lens[r], kv_lens[r]))
    groups: list[Group] = []
    members: list[int] = []
    num_queries = shortest = longest = 0
    for r in reversed(order):
        shorter, longer = min(shortest, kv_lens[r]), max(longest, kv_lens[r])
        fits = query_lens[r] >= _PAD_RATIO * num_queries and shorter >= min(_PAD_RATIO * longer, longer - _PAD_TOKENS)
        if members and fits:
            members.append(r)
            shortest, longest = shorter, longer
            continue
        if members:
            groups.append(Group(sorted(members), num_queries, longest))
        members = [r]
        num_queries, shortest, longest = query_lens[r], kv_lens[r], kv_lens[r]
    if members:
        groups.append(Group(sorted(members), num_queries, longest))
    return groups


def take_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Rows in ascending order; a view where they are consecutive, so that a device is never asked to wait."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[torch.tensor(rows, device=tensor.device)]


def put_rows(target: torch.Tensor, rows: list[int], value: torch.Tensor) -> None:
    """Write rows of the target, a view of an output."""
    if rows[-1] - rows[0] + 1 == len(rows):
        target[rows[0] : rows[-1] + 1] = value
    else:
        target[torch.tensor(rows, device=target.device)] = value


def gather_heads(cache: torch.Tensor, slots: torch.Tensor, heads: range) -> torch.Tensor:
    """Copy KV of some heads: cache [num_slots, H, D], slots [R, N] or [R, len(heads), N] -> [R, len(heads), N, D]."""
    num_kv_heads, head_dim = cache.shape[1:]
    if slots.dim() == 2:
        slots = slots[:, None, :]
    head = torch.arange(heads.start, heads.stop, device=slots.device)[None, :, None]
    if cache.stride(0) != num_kv_heads * cache.stride(1):
        return cache[slots, head]
    # heads are evenly spaced in memory: one index_select over rows of head_dim; the product is int64
    index = slots * num_kv_heads + head
    return cache.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, head_dim)


def capped(logits: torch.Tensor, logit_cap: float) -> torch.Tensor:
    """Soft cap, in place."""
    if logit_cap > 0.0:
        logits.div_(logit_cap).tanh_().mul_(logit_cap)
    return logits


def pack_queries(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[R, T, HQ, D] -> [R, H, T * G, D]; row t * G + g of a KV head is query t of the group's head g."""
    num_reqs, num_queries, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    packed = q.view(num_reqs, num_queries, num_kv_heads, group, head_dim).transpose(1, 2)
    return packed.reshape(num_reqs, num_kv_heads, num_queries * group, head_dim)


def unpack_queries(packed: torch.Tensor, num_queries: int) -> torch.Tensor:
    """The inverse of pack_queries."""
    num_reqs, num_kv_heads, _, head_dim = packed.shape
    out = packed.view(num_reqs, num_kv_heads, num_queries, -1, head_dim).transpose(1, 2)
    return out.reshape(num_reqs, num_queries, -1, head_dim)


def anchor_index(query_starts: torch.Tensor) -> torch.Tensor:
    """Anchor positions of requests [R] -> [R, NUM_ANCHORS], int64, -1 where there are fewer."""
    index = torch.arange(NUM_ANCHORS, device=query_starts.device)
    starts = query_starts.to(torch.int64)[:, None]
    index = torch.where((index < NUM_FIRST_ANCHORS) | (starts < NUM_ANCHORS), index, starts - NUM_ANCHORS + index)
    return index.masked_fill(index >= starts, -1)


@dataclass
class PagedProblem:
    """The arguments of paged_attention or capture_scores; `run` computes whichever result is asked for."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor | None
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    score_lens: torch.Tensor | None
    scale: float
    max_len: int
    logit_cap: float
    is_anchored: bool = False
    query_step: int = 1
    """Positions from one query to the next."""
    out: torch.Tensor | None = None
    """Where the output goes; None: a new tensor."""

    def kv_lens(self) -> torch.Tensor:
        """Positions that the last query of each request sees, 0 without queries: [R]."""
        kv_lens = self.query_starts + (self.query_lens - 1) * self.query_step + 1
        return kv_lens.masked_fill(self.query_lens == 0, 0)

    def run(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The output where there is a v_cache, the scores where there are score_lens."""
        num_reqs, num_queries, num_q_heads, head_dim = self.q.shape
        num_kv_heads = self.k_cache.shape[1]
        out = scores = starts = None
        if self.v_cache is not None:
            out = self.q.new_zeros(self.q.shape) if self.out is None else self.out.zero_()
        if self.score_lens is not None:
            scores = self.q.new_zeros((num_reqs, num_kv_heads, self.max_len), dtype=torch.float32)
        if self.q.device.type == "cpu":
            starts, lens = self.query_starts.tolist(), self.query_lens.tolist()
            groups = group_requests(lens, self.kv_lens().tolist())
            longest = max((group.kv_len for group in groups), default=0)
            if longest > self.max_len:
                raise ValueError(f"max_len: expected at least {longest}, the longest request, got {self.max_len}.")
        else:
            is_empty = self.q.numel() * self.max_len == 0
            groups = [] if is_empty else [Group(list(range(num_reqs)), num_queries, self.max_len)]

        # bytes that a position costs in one head: K and V, K in float32; logits, probabilities, those in q's dtype
        itemsize = self.q.element_size()
        kv_bytes = head_dim * (2 * itemsize + (4 if itemsize < 4 else 0))
        query_bytes = num_q_heads // num_kv_heads * (8 + itemsize)
        step_bytes = CPU_STEP_BYTES if starts is not None else DEVICE_STEP_BYTES
        for group in groups:
            head_bytes = group.kv_len * (kv_bytes + query_bytes * min(group.num_queries, 16))
            row_step = max(1, step_bytes // (head_bytes * num_kv_heads))
            head_step = max(1, min(num_kv_heads, step_bytes // head_bytes))
            for i in range(0, len(group.rows), row_step):
                rows = group.rows[i : i + row_step]
                query_step = max(16, step_bytes // (len(rows) * head_step * group.kv_len * query_bytes))
                step = _Step(self, rows, group, None if starts is None else [starts[r] for r in rows])
                for head in range(0, num_kv_heads, head_step):
                    step.run(range(head, min(head + head_step, num_kv_heads)), query_step, out, scores)
        return out, scores


class _Step:
    """Some requests of one group: their slots, lengths and queries, shared by the steps over heads and queries."""

    def __init__(self, problem: PagedProblem, rows: list[int], group: Group, starts: list[int] | None) -> None:
        device = problem.q.device
        self.problem, self.rows, self.kv_len, self.num_queries = problem, rows, group.kv_len, group.num_queries
        # every query sees the positions before min_start, none sees those from max_start + num_queries on
        self.min_start = -1 if starts is None else min(starts)
        self.max_start = group.kv_len if starts is None else max(starts)
        self.query_step = problem.query_step
        self.positions = torch.arange(group.kv_len, device=device)
        self.starts = take_rows(problem.query_starts, rows)[:, None]
        self.lens = take_rows(problem.query_lens, rows)[:, None]
        slots = problem.req_to_token[:, : group.kv_len].index_select(0, take_rows(problem.req_pool_indices, rows))
        # padding reads the request's own first token, which is as finite as the request is; without queries, slot 0
        kv_lens = take_rows(problem.kv_lens(), rows)[:, None]
        first = slots[:, :1].masked_fill(self.lens == 0, 0)
        self.slots = torch.where(self.positions < kv_lens, slots, first)
        # [R, T]
        self.is_valid = torch.arange(group.num_queries, device=device) < self.lens
        self.q = take_rows(problem.q, rows)[:, : group.num_queries]
        self.q = self.q.masked_fill(~self.is_valid[..., None, None], 0.0)

    def run(self, heads: range, query_step: int, out: torch.Tensor | None, scores: torch.Tensor | None) -> None:
        """Write the output and the scores of some KV heads."""
        problem = self.problem
        group = problem.q.shape[2] // problem.k_cache.shape[1]
        q_heads = slice(heads.start * group, heads.stop * group)
        k = gather_heads(problem.k_cache, self.slots, heads)
        v = None if problem.v_cache is None else gather_heads(problem.v_cache, self.slots, heads)
        is_exact = scores is not None or problem.logit_cap > 0.0
        if is_exact:
            k = k.float()
        total = torch.zeros(len(self.rows), len(heads), self.kv_len, device=k.device)
        attended = []
        for start in range(0, self.num_queries, query_step):
            end = min(start + query_step, self.num_queries)
            seen = min(self.kv_len, self.max_start + (end - 1) * self.query_step + 1)
            q = pack_queries(self.q[:, start:end, q_heads], len(heads))
            hidden_start, hidden = self._hidden(start, end, seen, group)
            if not is_exact and v is not None:
                mask = None
                if hidden.numel():
                    mask = q.new_zeros(len(self.rows), 1, q.shape[2], seen)
                    mask[..., hidden_start:].masked_fill_(hidden, -math.inf)
                part = F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], mask, scale=problem.scale)
                attended.append(unpack_queries(part, end - start))
                continue
            probs = self._probabilities(q, k[:, :, :seen], hidden_start, hidden)
            if v is not None:
                part = torch.bmm(probs.to(v.dtype), v[:, :, :seen].flatten(0, 1)).view(q.shape)
                attended.append(unpack_queries(part, end - start))
            if scores is not None:
                if problem.is_anchored:
                    probs = self._relative_to_anchors(probs)
                # the mean over the valid queries and the group, as one row vector: [R, T * G] -> [R * H, 1, T * G]
                weights = self.is_valid[:, start:end] / (self.lens.clamp(min=1) * group)
                weights = weights.repeat_interleave(group, dim=1).repeat_interleave(len(heads), dim=0)
                total[..., :seen] += torch.bmm(weights[:, None], probs).view(len(self.rows), len(heads), seen)
        if out is not None:
            value = torch.cat(attended, dim=1) if len(attended) > 1 else attended[0]
            value.masked_fill_(~self.is_valid[..., None, None], 0.0)
            put_rows(out[:, : self.num_queries, q_heads], self.rows, value)
        if scores is not None and problem.score_lens is not None:
            # without queries the whole row was computed from slot 0
            score_lens = take_rows(problem.score_lens, self.rows)[:, None].masked_fill(self.lens == 0, 0)
            total.masked_fill_((self.positions >= score_lens)[:, None], 0.0)
            put_rows(scores[:, heads.start : heads.stop, : self.kv_len], self.rows, total)

    def _relative_to_anchors(self, probs: torch.Tensor) -> torch.Tensor:
        """[R * H, M, N] -> the same, each row over what it pays to its anchors, at most 1."""
        index = anchor_index(self.starts[:, 0])
        is_anchor = torch.zeros(len(self.rows), self.kv_len + 1, device=probs.device)
        is_anchor.scatter_(1, torch.where(index < 0, self.kv_len, index), 1.0)
        is_anchor = is_anchor[:, : probs.shape[-1]].repeat_interleave(probs.shape[0] // len(self.rows), dim=0)
        mass = torch.bmm(probs, is_anchor[..., None])
        # a row that pays its anchors nothing has all its attention elsewhere
        return (probs / mass).nan_to_num_(0.0).clamp_(max=1.0)

    def _hidden(self, start: int, end: int, seen: int, group: int) -> tuple[int, torch.Tensor]:
        """The first position that some query may not see, and from there on which: [R, 1, T * G, seen - first]."""
        first = min(seen, self.min_start + start * self.query_step + 1)
        last_seen = self.starts + torch.arange(start, end, device=self.starts.device) * self.query_step
        hidden = self.positions[first:seen] > last_seen[..., None]
        return first, hidden.repeat_interleave(group, dim=1)[:, None]

    def _probabilities(self, q: torch.Tensor, k: torch.Tensor, hidden_start: int, hidden: torch.Tensor) -> torch.Tensor:
        """Softmax in float32: q [R, H, M, D], k [R, H, N, D] float32 -> [R * H, M, N]."""
        logits = torch.bmm((q.float() * self.problem.scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        capped(logits, self.problem.logit_cap)
        if hidden.numel():
            logits.view(*q.shape[:3], -1)[..., hidden_start:].masked_fill_(hidden, -math.inf)
        return torch.softmax(logits, dim=-1)
