"""A transformers model whose attention reads and writes a paged KV pool through this package's ops.

The model's own attention is replaced through transformers' AttentionInterface; projections, rotary embedding and all
the rest stay. Invariant: KV lives in the pool alone, so a pass may overwrite any position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = "sparsespec_acceptance"
MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")


class Pass(Protocol):
    """What attention does during one forward."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [R, T, HQ, D], k and v [R, T, H, D] of the tokens fed, rotated -> [R, T, HQ, D]."""
        ...


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sparsespec_pass: Pass,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    return sparsespec_pass.attend(layer, q, k, v, scaling), None


class PagedModel:
    """A causal language model and the KV pool of some requests.

    Args:
        path: checkpoint folder.
        device: where the model runs.
        dtype: of weights and KV.

    Raises:
        ConfigError: for an architecture that the explorer does not know to be plain full attention.
    """

    def __init__(self, path: str | Path, *, device: str, dtype: torch.dtype) -> None:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if config.model_type == "mixtral" and config.sliding_window is not None:
            # its configuration says so by a length alone
            layer_types = {"sliding_attention"}
        if config.model_type not in MODEL_TYPES or layer_types != {"full_attention"}:
            raise ConfigError(
                "the model's type",
                f"{config.model_type} with {', '.join(sorted(layer_types))}",
                f"one of {', '.join(MODEL_TYPES)} with full attention in every layer",
                "Measure on the server: scripts/bench/acceptance.py.",
            )
        AttentionInterface.register(ATTENTION, _attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=ATTENTION, dtype=dtype, local_files_only=True
        )
        self.model.to(device).eval()
        self.device, self.dtype = torch.device(device), dtype
        self.num_layers = int(config.num_hidden_layers)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.max_context = int(config.max_position_embeddings)
        self.req_to_token = torch.empty(0, 0, dtype=torch.int32)
        self.k_pool: list[torch.Tensor] = []
        self.v_pool: list[torch.Tensor] = []

    @property
    def down_projections(self) -> list[torch.nn.Module]:
        """By layer: what the gated activation is fed to."""
        return [layer.mlp.down_proj for layer in self.model.model.layers]

    def allocate(self, num_rows: int, max_len: int) -> None:
        """Room for `num_rows` requests of up to `max_len` tokens; drops what was there."""
        self.k_pool, self.v_pool = [], []
        slots = torch.arange(num_rows * max_len, dtype=torch.int32, device=self.device)
        self.req_to_token = slots.view(num_rows, max_len)
        shape = (num_rows * max_len, self.num_kv_heads, self.head_dim)
        for _ in range(self.num_layers):
            self.k_pool.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.v_pool.append(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def write(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [R, T, H, D] at `positions` ([R, T], int64) of the requests at `rows` ([R], int64)."""
        slots = self.req_to_token[rows[:, None], positions].long()
        self.k_pool[layer][slots] = k
        self.v_pool[layer][slots] = v

    def kv(self, layer: int, rows: range, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of neighbouring rows, [rows, max_len, H, D], as views: `allocate` lays requests out one by one."""
        shape = (*self.req_to_token.shape, self.num_kv_heads, self.head_dim)
        k, v = (pool[layer].view(shape)[rows.start : rows.stop, :max_len] for pool in (self.k_pool, self.v_pool))
        return k, v

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, attention: Pass, *, last_only: bool = False
    ) -> torch.Tensor:
        """Logits of tokens [R, T] at positions [R, T], float32 [R, T or 1, vocab_size]."""
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1 if last_only else 0,
            sparsespec_pass=attention,
        )
        logits: torch.Tensor = output.logits
        return logits.float()
