"""Make SPARSESPEC known to SGLang: the algorithm, its options, and the shims of a machine without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sglang
import torch
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

import sglang_sparsespec.patches as patches
from sglang_sparsespec.adapter import server_args as arguments
from sglang_sparsespec.errors import HostContractError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.server_args import ServerArgs

    from sglang_sparsespec.config import SparseSpecConfig


class SparseSpecFutureMap(FutureMap):
    """SGLang's relay between iterations; ours carries nothing but the bonus token and the length.

    The host's version pins the index tensor with `record_stream`, which CPU tensors lack; it calls that redundant
    itself, because the scheduler keeps the batch's tensors for two iterations.
    """

    def _resolve_spec_extras(self, batch: ScheduleBatch) -> None:
        draft_input = batch.spec_info
        if draft_input is not None and draft_input.future_indices.shape[0] > 0:
            draft_input.bonus_tokens = self.output_tokens_buf[draft_input.future_indices]


class SparseSpecAlgorithm(CustomSpecAlgo):
    """What SGLang asks an algorithm about itself.

    `create_future_map`, `need_topk` and `carries_draft_hidden_states` are asked of every algorithm, but the base
    class for plugins in 0.5.17 lacks them.
    """

    def create_future_map(
        self,
        device: torch.device,
        req_to_token_pool: ReqToTokenPool,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        return SparseSpecFutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def has_draft_kv(self) -> bool:
        # drafts live in the request's own pages
        return False

    def handle_server_args(self, server_args: ServerArgs) -> None:
        check_host()
        arguments.resolve(server_args)
        prepare_parent(server_args.sparsespec_config)


def prepare_parent(config: SparseSpecConfig) -> None:
    """Put in force what the process needs that answers clients: refusals of requests, and the label of a lossy server.

    Raises:
        HostContractError: if a patch cannot be applied; nothing is served then.
    """
    check_host()
    patches.apply(patches.LEDGER, "sparsespec")
    if config.verify_sparsity:
        patches.apply(patches.LEDGER, "lossy")


def check_host() -> None:
    """Raise unless the installed SGLang is one that this plugin was built and tested for.

    Raises:
        HostContractError: naming the version found and the versions that fit.
    """
    if sglang.__version__ not in patches.SUPPORTED_SGLANG:
        raise HostContractError(
            f"SGLang is {sglang.__version__}; sglang-sparsespec fits {', '.join(patches.SUPPORTED_SGLANG)}. "
            f"Install sglang=={patches.SUPPORTED_SGLANG[-1]}, or a sglang-sparsespec made for your version."
        )


def is_plain_cpu_host() -> bool:
    """True where torch sees no accelerator at all and SGLang's own CPU engine is not asked for."""
    from sglang.srt.utils import is_cpu

    return not torch.accelerator.is_available() and not is_cpu()


def register() -> None:
    @SpeculativeAlgorithm.register(arguments.ALGORITHM, supports_overlap=True, spec_class=SparseSpecAlgorithm)
    def create(server_args: ServerArgs) -> type:
        from sglang_sparsespec.adapter.worker import SparseSpecWorker

        # a scheduler process starts with a pickled ServerArgs: the patches of the algorithm are applied here
        check_host()
        patches.apply(patches.LEDGER, "sparsespec")
        config = getattr(server_args, "sparsespec_config", None)
        if config is not None and config.host_memory_bytes > 0:
            patches.apply(patches.LEDGER, "offload")
        return SparseSpecWorker

    arguments.install()
    if sglang.__version__ in patches.SUPPORTED_SGLANG and is_plain_cpu_host():
        patches.apply(patches.LEDGER, "cpu")
