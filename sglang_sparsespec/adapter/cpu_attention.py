"""Dense attention on a CPU: prefill and verify in vectorised torch, scores out of the same pass.

SGLang's own `torch_native` has no verify and loops over requests; this backend takes its place under SPARSESPEC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_sparsespec.ops.paged_attention import paged_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_sparsespec.adapter.attention_backend import CapturePlan


class TorchPagedAttnBackend(AttentionBackend):
    """Causal attention over the paged pool for extend, decode and verify."""

    needs_cpu_seq_lens = True

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.forward_metadata = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Nothing to plan: lengths are read where they are used."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if save_kv_cache:
            self._write_kv(k, v, layer, forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            num_queries = forward_batch.spec_info.draft_token_num
            starts = forward_batch.seq_lens
            out, _ = self._attend(q, layer, forward_batch.req_pool_indices, starts, num_queries)
            return out
        # prompts have very different lengths: one request at a time
        outs, token = [], 0
        for i, num_queries in enumerate(forward_batch.extend_seq_lens_cpu):
            start = forward_batch.extend_prefix_lens[i : i + 1]
            row = forward_batch.req_pool_indices[i : i + 1]
            outs.append(self._attend(q[token : token + num_queries], layer, row, start, num_queries)[0])
            token += num_queries
        return torch.cat(outs)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        if save_kv_cache:
            self._write_kv(k, v, layer, forward_batch)
        out, _ = self._attend(q, layer, forward_batch.req_pool_indices, forward_batch.seq_lens - 1, 1)
        return out

    def forward_verify_with_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        plan: CapturePlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._write_kv(k, v, layer, forward_batch)
        out, scores = self._attend(
            q,
            layer,
            plan.rows,
            plan.query_starts,
            plan.num_queries,
            score_lens=plan.selectable_lens,
            max_len=plan.max_len,
        )
        assert scores is not None
        return out, scores

    def _write_kv(self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _attend(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        rows: torch.Tensor,
        query_starts: torch.Tensor,
        num_queries: int,
        *,
        score_lens: torch.Tensor | None = None,
        max_len: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_starts = query_starts.to(torch.int32)
        out, scores = paged_attention(
            q.view(len(rows), num_queries, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            rows,
            query_starts,
            torch.full_like(query_starts, num_queries),
            scale=layer.scaling,
            max_len=int(query_starts.max()) + num_queries if max_len is None else max_len,
            score_lens=score_lens,
            logit_cap=layer.logit_cap,
        )
        return out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim), scores

    def support_triton(self) -> bool:
        return False
