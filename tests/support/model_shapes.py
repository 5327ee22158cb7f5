"""Shapes of real models, for arithmetic that can be checked by hand."""

from sglang_sparsespec.speculation.memory import ModelShape

# 36 layers, 8 KV heads of 128, bf16
QWEN3_8B = ModelShape(
    num_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    dtype_bytes=2,
)
