"""The shapes that a plan of memory follows from, out of the host's objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_sparsespec.kv.offload import CHUNK_BYTES
from sglang_sparsespec.ops._launch import num_multiprocessors
from sglang_sparsespec.selection import SelectionPolicy
from sglang_sparsespec.sparsity.block_lists import BlockRule
from sglang_sparsespec.speculation.memory import PAGE_TABLE_MARGIN, ModelShape, RoundShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.configs.model_config import ModelConfig
    from transformers import PretrainedConfig

    from sglang_sparsespec.config import SparseSpecConfig
    from sglang_sparsespec.selection.base import Policy


def model_shape(model: ModelConfig, num_ranks: int) -> ModelShape:
    """The served model, as one of `num_ranks` ranks sees it."""
    text = model.hf_text_config
    experts, experts_per_token = experts_of(text)
    return ModelShape(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        intermediate_size=_first_of(text, "intermediate_size") // num_ranks,
        num_q_heads=max(1, model.num_attention_heads // num_ranks),
        num_kv_heads=model.get_num_kv_heads(num_ranks),
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        dtype_bytes=model.dtype.itemsize,
        num_ranks=num_ranks,
        experts=experts,
        experts_per_token=experts_per_token,
        # every rank has a part of each expert
        expert_size=_first_of(text, "moe_intermediate_size", "intermediate_size") // num_ranks if experts else 0,
    )


def experts_of(config: PretrainedConfig) -> tuple[int, int]:
    """Experts of a layer, and those that a token visits; 0 and 0 of a dense model."""
    # Qwen and most others; Mixtral; DeepSeek and those that follow it
    experts = _first_of(config, "num_experts", "num_local_experts", "n_routed_experts")
    return experts, _first_of(config, "num_experts_per_tok") if experts else 0


def _first_of(config: PretrainedConfig, *names: str) -> int:
    """The first of some fields that is there and not 0; 0 without any."""
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)


def identity(
    model: ModelConfig, config: SparseSpecConfig, attention_backend: str, device: torch.device, num_ranks: int = 1
) -> dict[str, str]:
    """What the times of rounds depend on beside batch, k and KV in use: a profile of another server is refused."""
    # of the whole model; each of `num_ranks` ranks has a share
    shape = model_shape(model, 1)._replace(num_ranks=num_ranks)
    options = ("num_steps", "selection", "sharing", "granularity", "budget_ratio", "min_budget", "verify_attention")
    drafting = ("draft_sampling", "schedule", "ngram_assist", "draft_ffn_threshold", "draft_experts", "plain_steps")
    return {
        "architecture": " ".join(model.hf_config.architectures or ()),
        # of a dense model nothing is said about experts
        **{name: str(value) for name, value in shape._asdict().items() if value > 0},
        **{name: str(getattr(config, name)) for name in (*options, *drafting)},
        # only where there is any, so that profiles of lossless servers stay what they were
        **{name: str(value) for name, value in config.describe_loss().items()},
        "attention_backend": attention_backend,
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def block_rule(config: SparseSpecConfig) -> BlockRule | None:
    """What a sparse verify reads of a context; None: all of it."""
    if "attention" not in config.verify_sparsity:
        return None
    return BlockRule(config.verify_kv_ratio, config.verify_dense_below, config.verify_block_size)


def round_shape(
    model: ModelConfig,
    config: SparseSpecConfig,
    policy: Policy,
    *,
    max_reqs: int,
    batch_sizes: Sequence[int],
    shares_heads: bool,
    logits_dtype: torch.dtype,
    device: torch.device,
) -> RoundShape:
    """The rounds of a server.

    Args:
        model: what is served.
        config: SPARSESPEC's options.
        policy: selects.
        max_reqs: most requests of a round.
        batch_sizes: that are captured.
        shares_heads: whether the KV heads of a layer share a selection.
        logits_dtype: of logits, which drafts keep theirs of.
        device: that it all lies on.
    """
    stores = isinstance(policy, SelectionPolicy)
    rule = block_rule(config)
    # the verify's bound is a row of the page table, which is longer than the context
    table_len = model.context_len + PAGE_TABLE_MARGIN + 4 * config.num_draft_tokens
    return RoundShape(
        max_reqs=max_reqs,
        num_steps=config.num_steps,
        tail=config.draft_tail,
        max_budget=policy.max_budget(model.context_len) if stores else 0,
        context_len=model.context_len,
        batch_sizes=tuple(batch_sizes),
        is_fused=config.verify_attention == "fused",
        needs_scores=isinstance(policy, SelectionPolicy) and policy.needs_attention,
        shares_heads=shares_heads,
        samples_drafts=config.draft_sampling == "sampled",
        logits_bytes=logits_dtype.itemsize,
        num_sms=num_multiprocessors(device),
        narrower=tuple(steps + 1 for steps in config.step_choices[:-1]),
        num_guesses=config.ngram_assist,
        is_unified=config.has_unified,
        has_plain=config.most_plain_steps > 0,
        sparse_list_len=0 if rule is None else rule.list_len(table_len, config.num_draft_tokens),
        # a chunk on each of two queues
        staging_bytes=2 * CHUNK_BYTES if config.host_memory_bytes > 0 else 0,
        num_kv_blocks=0 if rule is None else -(-table_len // rule.block_size),
        drops_channels=config.verify_ffn_threshold > 0,
        has_both_verifies=bool(config.verify_sparsity) and config.has_dense_verify,
    )
