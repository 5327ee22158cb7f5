"""What models with experts read of a ForwardBatch: our drafts and fused verifies make theirs without SGLang's runners.

On a CPU the forwards run (tests/e2e/test_moe.py); this looks at the paths of a GPU and of options as well.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

# what a layer of theirs runs through; qwen2_moe has the model around Qwen3-MoE's layers
MODULES = (
    "models.qwen3_moe",
    "models.qwen2_moe",
    "models.mixtral",
    "models.utils",
    "layers.communicator",
    "layers.moe.topk",
    "layers.moe.fused_moe_triton.layer",
    "layers.moe.token_dispatcher.standard",
)
SET_BY_US = {"forward_mode", "input_ids", "out_cache_loc"}
UNREAD_BECAUSE_REFUSED = {
    "attn_cp_metadata": "attn_cp_size",
    "extend_seq_lens_cpu": "attn_cp_size",
    "seq_lens_cpu": "attn_cp_size",
    "dp_padding_mode": "enable_dp_attention",
    # routers take it with experts on several ranks only
    "num_token_non_padded": "moe_a2a_backend",
    "can_run_tbo": "enable_two_batch_overlap",
    # a prefill that stops between layers
    "hidden_states": "enable_pdmux",
    "residual": "enable_pdmux",
}


def fields_read(module: str) -> set[str]:
    # the source alone: some of these modules import kernels
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "srt" / (module.replace(".", "/") + ".py")
    return set(re.findall(r"\bforward_batch\.([a-z_]+)", source.read_text()))


def test_nothing_is_read_that_nobody_set() -> None:
    """A field that a new SGLang reads would be None in drafts and fused verifies, and set in its own forwards."""
    read = set().union(*(fields_read(module) for module in MODULES))
    assert read == SET_BY_US | set(UNREAD_BECAUSE_REFUSED)


def test_options_that_would_read_more_are_refused() -> None:
    """Fields that we leave out are safe only as long as their options are."""
    from sglang_sparsespec.adapter.support import REFUSALS

    assert set(UNREAD_BECAUSE_REFUSED.values()) <= {refusal.field for refusal in REFUSALS}
