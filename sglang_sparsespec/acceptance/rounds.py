"""A draft-verify round over a PagedModel, as `adapter.worker` runs it: draft, verify, refresh.

The forms of the server's two kinds of forward are here; acceptance is `measure`'s.
Invariant: after a round the KV of all its k + 1 tokens is exact, given those tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_sparsespec.acceptance.channels import ChannelDrop
from sglang_sparsespec.ops.paged_attention import paged_attention
from sglang_sparsespec.ops.score_capture import capture_scores
from sglang_sparsespec.ops.sparse_decode import sparse_decode
from sglang_sparsespec.selection import StepPolicy
from sglang_sparsespec.selection.step import StepDraftKV
from sglang_sparsespec.selection.store import SelectionStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.acceptance.settings import Setting
    from sglang_sparsespec.selection.base import Selection
    from sglang_sparsespec.selection.store import DraftKV

# prompt tokens per forward; bounds the memory of a prefill
PREFILL_CHUNK = 1024


class DensePass:
    """Full attention over what is committed and the tokens fed; shows each layer's queries to `observe`."""

    def __init__(
        self,
        model: PagedModel,
        rows: torch.Tensor,
        positions: torch.Tensor,
        observe: Callable[[int, torch.Tensor, float], None],
    ) -> None:
        self.model, self.rows, self.positions, self.observe = model, rows, positions, observe
        self.starts = positions[:, 0].to(torch.int32)
        self.lens = torch.full_like(self.starts, positions.shape[1])
        self.max_len = int(positions.max()) + 1

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self.model.write(layer, self.rows, self.positions, k, v)
        out, _ = paged_attention(
            q,
            self.model.k_pool[layer],
            self.model.v_pool[layer],
            self.model.req_to_token,
            self.rows,
            self.starts,
            self.lens,
            scale=scale,
            max_len=self.max_len,
        )
        self.observe(layer, q, scale)
        return out


class DraftPass:
    """One token per request over what its selection shows."""

    def __init__(
        self, model: PagedModel, rows: torch.Tensor, positions: torch.Tensor, draft_kv: DraftKV | StepDraftKV
    ) -> None:
        self.model, self.rows, self.positions, self.draft_kv = model, rows, positions, draft_kv

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        model = self.model
        model.write(layer, self.rows, self.positions, k, v)
        query = q[:, 0]
        slots, lens = self.draft_kv.layer_kv(layer, query, model.k_pool[layer], scale=scale, logit_cap=0.0)
        return sparse_decode(query, model.k_pool[layer], model.v_pool[layer], slots, lens, scale=scale)[:, None]


@dataclass(frozen=True)
class Prompts:
    """Requests whose prompts are in the pool; what every setting starts from."""

    lens: torch.Tensor
    """[num_reqs], int64, tokens."""
    next_logits: torch.Tensor
    """[num_reqs, vocab_size], float32, after the last prompt token."""
    queries: list[torch.Tensor]
    """By layer: [num_reqs, kept, num_q_heads, head_dim], of the last prompt tokens."""
    query_lens: torch.Tensor
    """[num_reqs], int32: how many of them each prompt has; they stand first."""
    scales: list[float]
    """By layer: factor on the logits."""


def prefill(model: PagedModel, prompts: list[list[int]], *, keep: int) -> Prompts:
    """Write the KV of each prompt, and keep the queries of its last `keep` tokens."""
    num_layers = model.num_layers
    query_lens = [min(keep, len(prompt)) for prompt in prompts]
    queries: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
    scales = [0.0] * num_layers
    logits = []
    for row, prompt in enumerate(prompts):
        rows = torch.tensor([row], device=model.device)
        tokens = torch.tensor([prompt], device=model.device)
        recent: list[torch.Tensor] = [tokens.new_zeros(0)] * num_layers

        def observe(layer: int, q: torch.Tensor, scale: float, recent: list[torch.Tensor] = recent) -> None:
            earlier = recent[layer]
            recent[layer] = (torch.cat([earlier, q[0]]) if earlier.numel() else q[0])[-keep:].clone()
            scales[layer] = scale

        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            positions = torch.arange(start, start + chunk.shape[1], device=model.device)[None]
            out = model.forward(chunk, positions, DensePass(model, rows, positions, observe), last_only=True)
        logits.append(out[:, -1])
        for layer in range(num_layers):
            missing = keep - recent[layer].shape[0]
            queries[layer].append(torch.nn.functional.pad(recent[layer], (0, 0, 0, 0, 0, missing)))
    return Prompts(
        torch.tensor([len(prompt) for prompt in prompts], device=model.device),
        torch.cat(logits),
        [torch.stack(by_row) for by_row in queries],
        torch.tensor(query_lens, dtype=torch.int32, device=model.device),
        scales,
    )


class RoundLogits(NamedTuple):
    """What a round says about its tokens."""

    drafts: torch.Tensor
    """[num_reqs, num_steps, vocab_size], float32: entry j chose, or would have chosen, draft j."""
    target: torch.Tensor
    """[num_reqs, num_steps + 1, vocab_size], float32: entry j decides on draft j."""
    tokens: torch.Tensor
    """[num_reqs, num_steps], int64: the drafts."""


class Drafter:
    """The rounds of one setting: its policy, and the selections in force.

    Args:
        model: with the prompts in its pool; positions past them are free to be overwritten.
        setting: options.
        prompts: what the first selection is made from.
    """

    def __init__(self, model: PagedModel, setting: Setting, prompts: Prompts) -> None:
        self.model, self.setting, self.config = model, setting, setting.config
        self.policy = setting.make_policy()
        self.channels = ChannelDrop(model.down_projections, self.config.draft_ffn_threshold)
        self._number = 0
        is_step = isinstance(self.policy, StepPolicy)
        num_heads = model.num_kv_heads if setting.is_by_head else 1
        self.store = SelectionStore(
            num_layers=model.num_layers,
            num_rows=model.req_to_token.shape[0],
            num_heads=num_heads,
            max_budget=0 if is_step else self.policy.max_budget(model.req_to_token.shape[1]),
            device=model.device,
        )
        rows = torch.arange(len(prompts.lens), device=model.device)
        lens = prompts.lens.to(torch.int32)
        wanted = prompts.query_lens.clamp(max=self.config.num_draft_tokens)
        # the newest queries stand last among the valid ones
        first = (prompts.query_lens - wanted)[:, None] + torch.arange(self.config.num_draft_tokens, device=model.device)
        for layer, queries in enumerate(prompts.queries):
            index = first.clamp(max=queries.shape[1] - 1).long()
            picked = queries[rows[:, None], index]
            self._refresh(layer, picked, prompts.scales[layer], rows, lens - wanted, wanted, lens, query_step=1)

    def round(
        self,
        rows: torch.Tensor,
        committed_lens: torch.Tensor,
        current: torch.Tensor,
        choose: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> RoundLogits:
        """Draft k tokens and verify them.

        Args:
            rows: [num_reqs], int64.
            committed_lens: [num_reqs], int64: tokens whose KV is exact; `current` goes there.
            current: [num_reqs], int64.
            choose: draft j from its logits [num_reqs, vocab_size].
        """
        self._number += 1
        positions = committed_lens[:, None] + torch.arange(self.config.num_draft_tokens, device=rows.device)
        draft_kv = self._draft_kv(rows, committed_lens.to(torch.int32))
        chain, logits = [current], []
        for step in range(self.config.num_steps):
            draft_kv = draft_kv.advanced()
            where = positions[:, step : step + 1]
            draft = DraftPass(self.model, rows, where, draft_kv)
            with self.channels.applied():
                logits.append(self.model.forward(chain[-1][:, None], where, draft)[:, 0])
            chain.append(choose(step, logits[-1]))
        tokens = torch.stack(chain, dim=1)
        target = self.model.forward(tokens, positions, self._verify_pass(rows, positions))
        return RoundLogits(torch.stack(logits, dim=1), target, tokens[:, 1:])

    def _draft_kv(self, rows: torch.Tensor, committed_lens: torch.Tensor) -> DraftKV | StepDraftKV:
        max_committed_len = int(committed_lens.max())
        if isinstance(self.policy, StepPolicy):
            return StepDraftKV(self.policy, rows, committed_lens, self.model.req_to_token, max_committed_len)
        return self.store.draft_kv(
            rows,
            committed_lens,
            self.model.req_to_token,
            max_selected=min(self.policy.max_budget(max_committed_len), self.store.positions.shape[-1]),
            tail=self.setting.draft_tail,
        )

    def _verify_pass(self, rows: torch.Tensor, positions: torch.Tensor) -> DensePass:
        committed_lens = positions[:, 0].to(torch.int32)
        captured = self.setting.captured_queries()
        starts = committed_lens + captured.start
        lens = torch.full_like(committed_lens, len(captured))

        def observe(layer: int, q: torch.Tensor, scale: float) -> None:
            picked = q[:, captured.start : captured.stop : captured.step]
            if self.setting.capture == "anchored":
                self._refresh_anchored(layer, q, scale, rows, starts, lens)
                return
            self._refresh(layer, picked, scale, rows, starts, lens, committed_lens, query_step=captured.step)

        return DensePass(self.model, rows, positions, observe)

    def _refresh(
        self,
        layer: int,
        queries: torch.Tensor,
        scale: float,
        rows: torch.Tensor,
        starts: torch.Tensor,
        lens: torch.Tensor,
        selectable_lens: torch.Tensor,
        *,
        query_step: int,
    ) -> None:
        if isinstance(self.policy, StepPolicy) or not self.setting.refreshes(self._number, layer):
            return
        scores = None
        max_len = int((starts + (lens - 1) * query_step).max()) + 1
        if self.policy.needs_attention:
            scores = capture_scores(
                queries,
                self.model.k_pool[layer],
                self.model.req_to_token,
                rows,
                starts,
                lens,
                selectable_lens,
                scale=scale,
                max_len=max_len,
                query_step=query_step,
            )
        self._write(layer, rows, self.policy.select(scores, selectable_lens, max_len))

    def _write(self, layer: int, rows: torch.Tensor, selection: Selection) -> None:
        """The selection of a layer, and of those that share it."""
        shared = self.setting.anchor_every if self.setting.captures else 1
        for sharing in range(layer, min(layer + shared, self.model.num_layers)):
            self.store.write(sharing, rows, selection)

    def _refresh_anchored(
        self,
        layer: int,
        queries: torch.Tensor,
        scale: float,
        rows: torch.Tensor,
        starts: torch.Tensor,
        lens: torch.Tensor,
    ) -> None:
        """From the scores of the attention pass; its output is computed once more for them, and dropped."""
        if isinstance(self.policy, StepPolicy) or not self.policy.needs_attention:
            self._refresh(layer, queries, scale, rows, starts, lens, starts, query_step=1)
            return
        if not self.setting.refreshes(self._number, layer):
            return
        max_len = int((starts + lens).max())
        num_kv_heads = self.model.num_kv_heads
        # columns that stay undefined lie past a request's selectable length
        scores = torch.zeros(num_kv_heads, len(rows) * max_len, device=queries.device)
        paged_attention(
            queries,
            self.model.k_pool[layer],
            self.model.v_pool[layer],
            self.model.req_to_token,
            rows,
            starts,
            lens,
            scale=scale,
            max_len=max_len,
            anchored_scores=scores,
            score_starts=torch.arange(len(rows), device=queries.device) * max_len,
        )
        by_request = scores.view(num_kv_heads, len(rows), max_len).transpose(0, 1)
        self._write(layer, rows, self.policy.select(by_request, starts, max_len))
