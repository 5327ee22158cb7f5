"""The ledger: every patch resolves, is in force, is looked after, and stands in patches/README.md."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import HostContractError
from tests.adapter import ledger_readme
from tests.support.server import server_env

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.adapter, pytest.mark.usefixtures("_registered")]

REPOSITORY = Path(__file__).resolve().parents[2]
HOST = "sparsespec_test_host"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module to patch, and a hook registry that forgets afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_sparsespec.patches import ledger

    module: Any = types.ModuleType(HOST)
    module.double = lambda x: 2 * x
    module.LIMIT = 10
    module.Pool = type("Pool", (), {"size": lambda self: 1})
    monkeypatch.setitem(sys.modules, HOST, module)
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(ledger, "_applied", set())
    return module


def patch(target: str, kind: Any, replacement: Any) -> Any:
    from sglang_sparsespec.patches import Patch

    return Patch(
        target=f"{HOST}.{target}",
        why="The test needs it.",
        how="-",
        upstream="-",
        remove_when="-",
        scope="sparsespec",
        kind=kind,
        replacement=replacement,
    )


def test_every_patch_is_in_force(server_args: Callable[..., Any]) -> None:
    """A target that SGLang moved leaves a server that runs without the change, and says nothing."""
    import sglang_sparsespec.patches as patches

    from sglang_sparsespec.adapter.registration import is_plain_cpu_host

    server_args()
    in_force = [p for p in patches.LEDGER if p.scope == "sparsespec" or (p.scope == "cpu" and is_plain_cpu_host())]
    patches.verify(in_force)
    assert {p.scope for p in patches.LEDGER} == {"cpu", "sparsespec", "offload", "lossy"}


def test_every_entry_is_complete() -> None:
    """An entry without a condition for its removal stays for ever."""
    from sglang_sparsespec.patches import LEDGER, SUPPORTED_SGLANG

    assert len({p.target for p in LEDGER}) == len(LEDGER), "ledger._applied knows a target once"
    for entry in LEDGER:
        for field in ("target", "why", "how", "upstream", "remove_when"):
            assert getattr(entry, field).strip(), (entry.target, field)
        assert set(entry.versions) <= set(SUPPORTED_SGLANG)
        assert entry.why.endswith("."), entry.target


def test_the_readme_shows_the_ledger() -> None:
    """A ledger that nobody keeps in step is worse than none; `python -m tests.adapter.ledger_readme` rewrites it."""
    assert ledger_readme.entries_of(ledger_readme.README.read_text()) == ledger_readme.render().strip("\n")


@pytest.mark.parametrize(
    ("target", "kind", "replacement"),
    [
        ("double", "around", lambda original, x: original(x) + 1),
        ("double", "before", lambda x: ((x + 1,), {})),
        ("double", "after", lambda result, x: result + 1),
        ("double", "replace", lambda x: 3 * x),
        ("Pool.size", "replace", lambda self: 7),
        ("Pool", "replace", type("OtherPool", (), {})),
        ("LIMIT", "value", 20),
    ],
    ids=str,
)
def test_apply_puts_each_kind_in_place(host: Any, target: str, kind: Any, replacement: Any) -> None:
    """A kind that `verify` cannot recognise would refuse a good server, or pass a bad one."""
    from sglang_sparsespec.patches import apply, verify

    entry = patch(target, kind, replacement)
    with pytest.raises(HostContractError, match="is not in force"):
        verify([entry])
    apply([entry], "sparsespec")
    verify([entry])
    before = {"double": host.double, "LIMIT": host.LIMIT, "Pool": host.Pool}
    apply([entry], "sparsespec")
    assert before == {"double": host.double, "LIMIT": host.LIMIT, "Pool": host.Pool}, "applied twice"
    assert kind == "value" or target != "double" or host.double(1) in (3, 4)


def test_apply_takes_its_own_scope_only(host: Any) -> None:
    """On a GPU host the patches of a CPU must stay out."""
    from sglang_sparsespec.patches import apply

    apply([patch("LIMIT", "value", 20)], "cpu")
    assert host.LIMIT == 10


@pytest.mark.parametrize("target", ["gone", "Pool.gone", "gone.module.function"])
def test_a_missing_target_is_named(host: Any, target: str) -> None:
    """The message is what the user of another SGLang sees: it must name the symbol, both versions, and the way out."""
    import sglang
    from sglang_sparsespec.patches import SUPPORTED_SGLANG, apply, verify

    entry = patch(target, "around", lambda original: original())
    for action in (lambda: apply([entry], "sparsespec"), lambda: verify([entry])):
        with pytest.raises(HostContractError) as caught:
            action()
        message = str(caught.value)
        assert message.startswith(f"{HOST}.{target} was not found (")
        assert f"in SGLang {sglang.__version__}; this patch fits {SUPPORTED_SGLANG[0]}. " in message
        assert (
            "It is needed because: The test needs it. Install a supported SGLang, or see patches/README.md." in message
        )


def test_a_failure_that_the_host_only_logs_is_raised(host: Any) -> None:
    """SGLang's registry refuses to wrap a class, logs that, and goes on."""
    from sglang_sparsespec.patches import apply

    with pytest.raises(HostContractError, match=r"\.Pool is not in force"):
        apply([patch("Pool", "around", lambda original: original())], "sparsespec")


def test_a_patch_that_was_undone_is_noticed(host: Any) -> None:
    """Another plugin may replace the same function after us."""
    from sglang_sparsespec.patches import apply, verify

    function, value = patch("double", "after", lambda result, x: result + 1), patch("LIMIT", "value", 20)
    apply([function, value], "sparsespec")
    host.LIMIT = 30
    verify([function])
    with pytest.raises(HostContractError, match=r"\.LIMIT is not in force"):
        verify([value])
    host.double = lambda x: x
    with pytest.raises(HostContractError, match=r"\.double is not in force"):
        verify([function])


def test_a_hook_under_another_plugins_hook_is_in_force(host: Any) -> None:
    """Wrapping us is legitimate: a profiler that does so must not stop the server."""
    import functools

    from sglang_sparsespec.patches import apply, verify

    entry = patch("double", "around", lambda original, x: original(x) + 1)
    apply([entry], "sparsespec")
    ours = host.double

    @functools.wraps(ours)
    def profiled(x: int) -> int:
        return ours(x)

    host.double = profiled
    verify([entry])


def test_worker_refuses_to_start_without_its_patches(
    monkeypatch: pytest.MonkeyPatch, server_args: Callable[..., Any]
) -> None:
    """The last gate: whatever happened on the way to the scheduler, it must not serve without them."""
    from sglang.srt.mem_cache import allocation_sizing

    from sglang_sparsespec.adapter.worker import SparseSpecWorker

    args = server_args()
    stock = allocation_sizing.get_req_to_token_extra_context_len.__wrapped__
    monkeypatch.setattr(allocation_sizing, "get_req_to_token_extra_context_len", stock)
    unused: Any = None
    with pytest.raises(HostContractError, match="get_req_to_token_extra_context_len is not in force"):
        SparseSpecWorker(args, 0, unused, 0, unused)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 16])
def test_page_table_rows_hold_what_a_step_may_reserve(
    server_args: Callable[..., Any], page_size: int, num_steps: int
) -> None:
    """A row that is too short lets a request near the context limit write into its neighbour's row."""
    from sglang.srt.mem_cache import allocation_sizing as sizing

    args = server_args(page_size=page_size, speculative_num_steps=num_steps)
    headroom = sizing.get_req_to_token_extra_context_len(args)
    # a decode step allocates up to the committed length and the reserve, in whole pages
    assert headroom >= sizing.get_alloc_reserve_per_decode(args) + page_size - 1


@pytest.mark.parametrize("page_size", [1, 16])
def test_unified_rounds_have_slots_for_what_they_draft_ahead(server_args: Callable[..., Any], page_size: int) -> None:
    """Drafts behind a verify would go to slots of whoever had these positions of the row before."""
    from sglang.srt import runtime_context
    from sglang.srt.mem_cache import allocation_sizing as sizing

    options = {"page_size": page_size, "speculative_num_steps": 5}
    lockstep = server_args(**options)
    unified = server_args(sparsespec_schedule="unified", **options)
    assert sizing.get_alloc_reserve_per_decode(lockstep) == 2 * 6
    # a round in flight that commits 6, then 6 that are verified, then 5 drafts
    assert sizing.get_alloc_reserve_per_decode(unified) == 3 * 6 >= 6 + 6 + 5
    assert sizing.get_req_to_token_extra_context_len(unified) >= 3 * 6 + page_size - 1
    # the schedulers ask without arguments
    runtime_context.publish(unified, role="test")
    assert sizing.get_alloc_reserve_per_decode() == 3 * 6
    runtime_context.reset_context()
    assert sizing.get_alloc_reserve_per_decode(server_args(speculative_algorithm=None)) == 2


def test_page_table_rows_of_other_servers_stay_as_they_are(server_args: Callable[..., Any]) -> None:
    """The patch is in force for every engine of this process."""
    from sglang.srt.mem_cache import allocation_sizing as sizing

    server_args()
    args = server_args(speculative_algorithm=None)
    wrapped = sizing.get_req_to_token_extra_context_len
    assert wrapped(args) == wrapped.__wrapped__(args) == 4


WITHOUT_THE_FLAG = """
    import sys
    import torch
    # a GPU host, as far as the plugin asks
    torch.accelerator.is_available = lambda: True

    from sglang_sparsespec import plugin
    plugin.register()
    import sglang_sparsespec.patches as patches
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang_sparsespec.errors import HostContractError

    def in_force():
        found = []
        for patch in patches.LEDGER:
            try:
                patches.verify([patch])
            except HostContractError as error:
                assert "is not in force" in str(error), error
            else:
                found.append(patch.target)
        return found

    model = sys.argv[1]
    # an older CPU path of SGLang needs no accelerator to resolve its arguments
    ServerArgs(model_path=model, device="cpu", attention_backend="torch_native")
    assert in_force() == [], in_force()
    assert not HookRegistry._hooks, HookRegistry._hooks

    def targets(*scopes):
        return [patch.target for patch in patches.LEDGER if patch.scope in scopes]

    def create_worker(**options):
        options = {"device": "cpu", "attention_backend": "torch_native", "disable_overlap_schedule": True, **options}
        args = ServerArgs(model_path=model, speculative_algorithm="SPARSESPEC", **options)
        return SpeculativeAlgorithm.from_string("SPARSESPEC").create_worker(args)

    create_worker()
    assert in_force() == targets("sparsespec"), in_force()
    create_worker(sparsespec_host_memory_gb=0.1)
    assert in_force() == targets("sparsespec", "offload"), in_force()
    print("as promised")
"""


@pytest.mark.slow
def test_without_the_flag_nothing_is_patched(tiny_qwen3_path: Path) -> None:
    """Whoever installs the plugin and does not use it must have the SGLang that they installed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_THE_FLAG), str(tiny_qwen3_path)],
        cwd=REPOSITORY,
        env=server_env({}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("as promised")
