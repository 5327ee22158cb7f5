"""SGLang in float32 on a GPU: what sgl_kernel has in half precision alone runs in torch, in plain servers and ours.

    PYTHONPATH=scripts/bench/float32_gpu TRITON_F32_DEFAULT=ieee python scripts/bench/parity.py --model TINY \\
        --dtype float32 --attention-backend triton --disable-prefill-cuda-graph --tolerance 0.01 ...

Python imports a module of this name at every start, so every process of a server is changed. For parity runs of
mixtures of experts (docs/results.md), whose routers amplify what half precision rounds; not for anything that is timed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType


def layernorm(module: Any) -> None:
    module.RMSNorm.forward_cuda = module.RMSNorm.forward_native


def qk_norm(module: Any) -> None:
    module.can_use_fused_inplace_qknorm = lambda *sizes: False


def rotary_embedding(module: Any) -> None:
    module.RotaryEmbedding.forward_cuda = module.RotaryEmbedding.forward_native


def fused_moe(module: Any) -> None:
    import torch.nn.functional as F

    def silu_and_mul(x: Any, out: Any) -> Any:
        half = x.shape[-1] // 2
        return out.copy_(F.silu(x[..., :half]) * x[..., half:])

    def moe_sum_reduce(x: Any, out: Any, factor: float) -> None:
        out.copy_(x.sum(dim=1) * factor)

    module.silu_and_mul, module.moe_sum_reduce = silu_and_mul, moe_sum_reduce
    module._use_moe_sum_reduce_torch_compile = lambda num_tokens: False


PATCHES: dict[str, Callable[[Any], None]] = {
    "sglang.srt.layers.layernorm": layernorm,
    "sglang.srt.models.utils": qk_norm,
    "sglang.srt.layers.rotary_embedding.base": rotary_embedding,
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe": fused_moe,
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches a module when it has been executed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in PATCHES:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            PATCHES[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
