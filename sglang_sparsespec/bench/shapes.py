"""Shapes of models: what a round reads and multiplies, and checkpoints without weights for `--load-format dummy`.

python -m sglang_sparsespec.bench.shapes qwen3-1.7b OUT_DIR
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_sparsespec.errors import ConfigError

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        **QWEN3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3-14b": {
        **QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    # 30.5 B weights, of which a token visits 3.3 B
    "qwen3-30b-a3b": {
        **QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention, dense or with a mixture of experts in every layer."""

    hidden: int
    intermediate: int
    """Width of the feed-forward network, or of one expert."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int
    experts: int = 0
    """Of a layer; 0: a dense model."""
    experts_per_token: int = 0

    @property
    def layer_params(self) -> int:
        """Weights of all layers: attention projections and gated feed-forward networks; norms are too few to count."""
        return round(self._layer_params(max(1, self.experts)))

    @property
    def active_layer_params(self) -> int:
        """Those that one token is multiplied with."""
        return round(self._layer_params(max(1, self.experts_per_token)))

    def read_layer_params(self, rows: int) -> float:
        """Those that a step of `rows` tokens reads: of a mixture of experts, the experts that one of them visits."""
        return self._layer_params(self.touched_experts(rows) if self.experts else 1)

    def touched_experts(self, rows: int) -> float:
        """Experts of a layer that at least one of `rows` tokens visits, where routers choose evenly and by themselves.

        A token visits k of E experts, so it misses a given one with probability 1 - k / E, and all tokens miss it with
        (1 - k / E) ** rows; E experts are hit with what is left of 1, and expectations add. Tokens that resemble each
        other, as those of one text do, visit fewer.
        """
        return self.experts * (1.0 - (1.0 - self.experts_per_token / self.experts) ** rows) if self.experts else 0.0

    def _layer_params(self, networks: float) -> float:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        router = self.hidden * self.experts
        return self.layers * (attention + router + networks * 3 * self.hidden * self.intermediate)

    @property
    def head_params(self) -> int:
        """Weights of lm_head, read in every step; the embedding is only looked up."""
        return self.vocab * self.hidden

    @property
    def stored_params(self) -> int:
        return self.layer_params + self.head_params * (1 if self.tied else 2)

    def splits_over(self, ranks: int) -> bool:
        """Whether SGLang can give every rank whole heads."""
        return self.heads % ranks == 0 and (self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0)

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """From a Hugging Face config.json.

    Raises:
        ConfigError: for a field that a decoder has and this one lacks, or a mixture of experts in some layers only.
    """
    try:
        heads = int(config["num_attention_heads"])
        experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        if experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
            raise KeyError("experts in every layer")
        width = config.get("moe_intermediate_size") if experts else None
        return ModelShape(
            hidden=int(config["hidden_size"]),
            intermediate=int(width or config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            context=int(config["max_position_embeddings"]),
            experts=experts,
            experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
        )
    except KeyError as error:
        raise ConfigError(
            "config.json",
            f"without {error}",
            "that of a decoder (Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral, ...)",
            "Name another model.",
        ) from None


def read_shape(model_path: Path) -> ModelShape:
    """The shape of a checkpoint folder.

    Raises:
        ConfigError: if there is no readable config.json.
    """
    try:
        config = json.loads((model_path / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(
            "--model", str(model_path), "a folder with a config.json", "Name a local checkpoint."
        ) from None
    return shape_from_config(config)


def write_shape(name: str, out: Path) -> Path:
    """A folder that `--load-format dummy --skip-tokenizer-init` can serve.

    Raises:
        ConfigError: for a name that is not in SHAPES.
    """
    if name not in SHAPES:
        raise ConfigError("shape", name, f"one of {', '.join(SHAPES)}", "See sglang_sparsespec/bench/shapes.py.")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(SHAPES[name], indent=1) + "\n")
    return out


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python -m sglang_sparsespec.bench.shapes {{{','.join(SHAPES)}}} OUT_DIR")
    write_shape(sys.argv[1], Path(sys.argv[2]))
