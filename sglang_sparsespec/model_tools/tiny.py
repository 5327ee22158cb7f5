"""Random checkpoints small enough to serve on a laptop in a second, for tests of the whole path.

The text means nothing, but it behaves like text: logits are not flat, greedy output wanders instead of repeating one
token, and attention is peaked and changes slowly from one query to the next. A draft that sees the KV tokens which the
last queries attended to is then right now and then, and one that sees the wrong tokens is not: with 64 of 600 tokens
about 0.7 drafts of 8 are correct, with 128 about one (measured, default sizes, 600 random characters).
Invariant: a checkpoint is a function of its arguments; the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Arch = Literal["qwen3", "llama", "qwen3-moe", "mixtral"]
ARCHS: tuple[Arch, ...] = get_args(Arch)
MOE_ARCHS = ("qwen3-moe", "mixtral")
EXPERT_WIDTH_UNIT = 32

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_BYTES = 256
MIN_VOCAB = NUM_BYTES + len(SPECIAL_TOKENS)
# the last two: all experts of a layer, and the router, which would otherwise send every token to the same ones
_BLIND_TO_COMMON = (
    "v_proj.weight",
    "gate_proj.weight",
    "up_proj.weight",
    "lm_head.weight",
    "experts.gate_up_proj",
    "mlp.gate.weight",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_model(
    path: str | Path,
    *,
    arch: Arch = "qwen3",
    hidden: int = 64,
    layers: int = 3,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int | None = None,
    experts: int = 8,
    experts_per_token: int = 2,
    vocab: int = MIN_VOCAB,
    seed: int = 0,
    dtype: str = "float32",
    context: int = 4096,
    attention_gain: float = 4.0,
    shared: float = 1.2,
) -> Path:
    """Write a random `arch` checkpoint with a byte-level tokenizer to `path`.

    Args:
        head_dim: 16 if it is left out; of Mixtral always hidden / heads, for SGLang looks at nothing else.
        experts: of a layer, where `arch` has any; each is as wide as the dense network over `experts_per_token`.
        experts_per_token: that the router chooses; their weights sum to 1.
        vocab: at least 259: 256 bytes and 3 special tokens; ids past those decode to filler words.
        dtype: a torch dtype's name, for the weights and for config.json.
        attention_gain: standard deviation of the attention logits; 0 attends evenly, 4 to few tokens.
        shared: strength of the part that all token embeddings share. Queries inherit it, and so agree on which keys
            matter; 0 gives every token its own taste, and no selection made for one query serves the next.
    """
    import torch

    if vocab < MIN_VOCAB:
        raise ValueError(f"vocab is {vocab}; it must be at least {MIN_VOCAB}: 256 bytes and 3 special tokens.")
    if arch not in ARCHS:
        raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(map(repr, ARCHS))}.")
    if arch == "mixtral" and head_dim not in (None, hidden // heads):
        raise ValueError(f"head_dim is {head_dim}; it must be hidden / heads, {hidden // heads}, or left out.")
    if not 1 <= experts_per_token <= experts:
        raise ValueError(f"experts_per_token is {experts_per_token}; it must be 1 to experts, {experts}.")
    intermediate = 2 * hidden
    if arch in MOE_ARCHS and intermediate // experts_per_token % EXPERT_WIDTH_UNIT:
        raise ValueError(
            f"an expert's width, 2 x hidden / experts_per_token, is {intermediate // experts_per_token}; it must be a "
            f"multiple of {EXPERT_WIDTH_UNIT}: SGLang on a CPU pads others, with what happens to be in memory."
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    end_of_turn = NUM_BYTES + SPECIAL_TOKENS.index("<|im_end|>")
    kwargs: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or (hidden // heads if arch == "mixtral" else 16),
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "bos_token_id": NUM_BYTES,
        "eos_token_id": end_of_turn,
        "pad_token_id": NUM_BYTES,
    }
    if arch in MOE_ARCHS:
        kwargs["num_experts_per_tok"] = experts_per_token
        kwargs["num_experts" if arch == "qwen3-moe" else "num_local_experts"] = experts
        width = "moe_intermediate_size" if arch == "qwen3-moe" else "intermediate_size"
        kwargs[width] = intermediate // experts_per_token
    config, model = _make(arch, kwargs)
    config.architectures = [type(model).__name__]

    # fixed order (sorted names) and own generator: the global seed neither matters nor moves
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                # q_norm and k_norm set the scale of a Qwen3 head's queries and keys after normalisation
                gain = math.sqrt(attention_gain) if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
                weight.fill_(gain)
                continue
            # the last dimension is what is summed over; an expert's weights are a slice of [experts, out, in]
            std = 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(weight.shape[-1])
            if "lm_head" in name:
                # logits with a standard deviation of 3: peaked, yet far from one token
                std *= 3.0
            elif not arch.startswith("qwen3") and name.endswith(("q_proj.weight", "k_proj.weight")):
                std *= math.sqrt(attention_gain)
            elif name.endswith("o_proj.weight"):
                # a weighted mean over many tokens is small; bring attention's share up to that of the residual
                std *= 1.2
            elif name.endswith("experts.down_proj"):
                # a mean over experts that agree on nothing; likewise
                std *= math.sqrt(experts_per_token)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        common = torch.randn(hidden, generator=generator)
        common *= math.sqrt(hidden) / common.norm()
        model.get_input_embeddings().weight.add_(shared * common)
        for name, weight in model.named_parameters():
            # queries and keys see the common part; the rest must not, or it would say the same at every position
            if name.endswith(_BLIND_TO_COMMON):
                weight.sub_((weight @ common)[..., None] * common / hidden)
        head = model.get_output_embeddings().weight
        # random text should neither stop by itself nor emit ids without a text
        head[NUM_BYTES:] = 0.0
    model.to(getattr(torch, dtype)).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_of_turn]}, indent=2) + "\n")
    _write_tokenizer(path, vocab, context)
    return path


def _make(arch: Arch, kwargs: dict[str, Any]) -> tuple[PretrainedConfig, PreTrainedModel]:
    import transformers

    names = {"qwen3": "Qwen3", "llama": "Llama", "qwen3-moe": "Qwen3Moe", "mixtral": "Mixtral"}
    # Qwen3's own checkpoints say so; Mixtral always does
    extra = {"norm_topk_prob": True} if arch == "qwen3-moe" else {}
    config = getattr(transformers, f"{names[arch]}Config")(**kwargs, **extra)
    return config, getattr(transformers, f"{names[arch]}ForCausalLM")(config)


def _write_tokenizer(path: Path, vocab: int, context: int) -> None:
    """One token per byte: ids 0..255 are the bytes in byte-level order, then the special tokens, then fillers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *SPECIAL_TOKENS, *(f"<|filler_{i}|>" for i in range(vocab - MIN_VOCAB))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
