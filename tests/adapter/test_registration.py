"""The algorithm as SGLang sees it: registered once, and with an answer to everything that an algorithm is asked."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec import plugin
from sglang_sparsespec.errors import HostContractError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_sparsespec.adapter.registration import SparseSpecAlgorithm

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]


@pytest.fixture
def algorithm() -> SparseSpecAlgorithm:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    found = SpeculativeAlgorithm.from_string("SPARSESPEC")
    return found  # type: ignore[return-value]


def _questions() -> list[str]:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    return sorted(
        n for n in vars(SpeculativeAlgorithm) if n.startswith(("is_", "supports_", "has_", "carries_", "need"))
    )


def test_register_is_idempotent(algorithm: SparseSpecAlgorithm) -> None:
    """SGLang refuses a name twice; load_plugins() and a test or an embedding program may both call us."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_sparsespec.adapter import registration

    plugin.register()
    assert SpeculativeAlgorithm.from_string("sparsespec") is algorithm
    assert isinstance(algorithm, registration.SparseSpecAlgorithm)
    with pytest.raises(ValueError, match="already registered"):
        registration.register()


def test_algorithm_answers_every_question_of_the_enum(algorithm: SparseSpecAlgorithm) -> None:
    """A missing answer is an AttributeError somewhere in the scheduler, on the first batch that gets there."""
    answers = {name: getattr(algorithm, name)() for name in _questions()}
    assert len(answers) > 15
    assert all(isinstance(answer, bool) for answer in answers.values())
    assert {name for name, answer in answers.items() if answer} == {"is_some", "is_speculative"}
    assert algorithm.supports_overlap is True


def test_algorithm_has_every_method_of_the_enum(algorithm: SparseSpecAlgorithm) -> None:
    """SGLang checks `is_*` and `supports_*` alone; three of the others are missing from its base class."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    public = {
        name
        for name, member in vars(SpeculativeAlgorithm).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    assert {name for name in public if not hasattr(algorithm, name)} == set()
    missing = {name for name in public if not hasattr(CustomSpecAlgo, name)}
    assert missing == {"create_future_map", "need_topk", "carries_draft_hidden_states"}


@pytest.mark.parametrize(
    "name", ["create_future_map", "need_topk", "carries_draft_hidden_states", "handle_server_args"]
)
def test_overridden_methods_keep_the_hosts_signature(algorithm: SparseSpecAlgorithm, name: str) -> None:
    """A parameter that SGLang adds or renames would otherwise fail at start-up, far from its cause."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    host = inspect.signature(getattr(SpeculativeAlgorithm, name)).parameters
    ours = inspect.signature(getattr(type(algorithm), name)).parameters
    assert [(p.name, p.default) for p in host.values()] == [(p.name, p.default) for p in ours.values()]


def test_future_map_relays_the_bonus_token_of_each_request(algorithm: SparseSpecAlgorithm) -> None:
    """A gather by batch row instead of pool row would hand requests each other's tokens once the batch changes."""
    from sglang_sparsespec.adapter.spec_input import SparseSpecDraftInput

    pool: Any = SimpleNamespace(req_to_token=torch.zeros(6, 8, dtype=torch.int32))
    relay = algorithm.create_future_map(torch.device("cpu"), pool)
    relay.output_tokens_buf[:] = torch.arange(6) * 10
    draft_input = SparseSpecDraftInput(bonus_tokens=torch.zeros(0, dtype=torch.int64))
    draft_input.future_indices = torch.tensor([4, 1])
    batch: Any = SimpleNamespace(spec_info=draft_input)
    relay._resolve_spec_extras(batch)
    assert draft_input.bonus_tokens.tolist() == [40, 10]
    empty: Any = SimpleNamespace(spec_info=None)
    relay._resolve_spec_extras(empty)


@pytest.mark.parametrize("is_relayed", [False, True], ids=["direct", "relayed"])
def test_draft_input_follows_its_batch(is_relayed: bool) -> None:
    """Requests leave and join every round; an input that keeps the old order drafts after the wrong tokens."""
    from sglang_sparsespec.adapter.spec_input import SparseSpecDraftInput

    def make(*values: int) -> SparseSpecDraftInput:
        tensor = torch.tensor(values)
        return SparseSpecDraftInput(bonus_tokens=tensor, future_indices=tensor.clone() if is_relayed else None)

    first, second = make(3, 5, 7), make(9)
    first.filter_batch(torch.tensor([2, 0]))
    first.merge_batch(second)
    carried = first.future_indices if is_relayed else first.bonus_tokens
    assert carried is not None
    assert carried.tolist() == [7, 3, 9]


def test_other_versions_of_sglang_are_refused(monkeypatch: pytest.MonkeyPatch, server_args: Callable[..., Any]) -> None:
    """On a release that nobody tested the algorithm must not start, however well it seems to run."""
    import sglang

    from sglang_sparsespec.adapter import registration

    registration.check_host()
    monkeypatch.setattr(sglang, "__version__", "0.5.18")
    with pytest.raises(HostContractError, match=r"^SGLang is 0\.5\.18; sglang-sparsespec fits 0\.5\.17\. Install "):
        registration.check_host()
    with pytest.raises(HostContractError):
        server_args()
    # without the algorithm SGLang serves as if the plugin were not there
    assert server_args(speculative_algorithm=None).speculative_algorithm is None


def test_scheduler_process_gets_the_worker(server_args: Callable[..., Any], algorithm: SparseSpecAlgorithm) -> None:
    """Schedulers start from a pickled ServerArgs and ask the registry; the worker and its patches come from there."""
    import sglang_sparsespec.patches as patches

    from sglang_sparsespec.adapter.worker import SparseSpecWorker

    assert algorithm.create_worker(server_args()) is SparseSpecWorker
    patches.verify(patch for patch in patches.LEDGER if patch.scope == "sparsespec")
