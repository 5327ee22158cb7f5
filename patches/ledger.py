"""What a patch is, how it is applied, and how the server makes sure that it is in place.

SGLang's own HookRegistry wraps the functions; it logs a failure and goes on, so `verify` looks at the host again
and raises. Values (module constants, kernels) have no hook type there and are set here.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from sglang_sparsespec.errors import HostContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SUPPORTED_SGLANG = ("0.5.17",)

Scope = Literal["always", "cpu", "sparsespec", "offload", "lossy"]
Kind = Literal["around", "before", "after", "replace", "value"]

_HOOK_TYPES = {
    "around": HookType.AROUND,
    "before": HookType.BEFORE,
    "after": HookType.AFTER,
    "replace": HookType.REPLACE,
}
_SOURCE = HookSource(plugin_name="sparsespec", dist_name="sglang-sparsespec")
_applied: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to the host. The first five fields are the ledger entry (patches/README.md)."""

    target: str
    """Dotted path of the function, class or value that changes."""
    why: str
    """The requirement that neither registration nor a subclass meets."""
    how: str
    """The change, in one sentence."""
    upstream: str
    """Issue or pull request, or why there is none."""
    remove_when: str
    """A condition that someone can check."""
    scope: Scope
    """`always`: on load. `cpu`: on load, on a machine without an accelerator. `sparsespec`: with the algorithm only.
    `offload`: with the algorithm and `--sparsespec-host-memory-gb` above 0, in scheduler processes.
    `lossy`: with the algorithm and `--sparsespec-verify-sparsity`, in the process that answers clients."""
    kind: Kind
    replacement: Any
    """Hook function (see SGLang's HookType), replacing class, or new value."""
    versions: tuple[str, ...] = SUPPORTED_SGLANG


def apply(patches: Iterable[Patch], scope: Scope) -> None:
    """Put the patches of `scope` in place, each once per process.

    Raises:
        HostContractError: the target does not exist, or the wrapping did not happen.
    """
    chosen = [patch for patch in patches if patch.scope == scope]
    for patch in chosen:
        if patch.target in _applied:
            continue
        _resolve(patch)
        if patch.kind == "value":
            parent, name = patch.target.rsplit(".", 1)
            setattr(pkgutil.resolve_name(parent), name, patch.replacement)
        else:
            HookRegistry.register(patch.target, patch.replacement, _HOOK_TYPES[patch.kind], source=_SOURCE)
        _applied.add(patch.target)
    HookRegistry.apply_hooks()
    verify(chosen)


def verify(patches: Iterable[Patch]) -> None:
    """Raise unless every patch is in force in this process.

    Raises:
        HostContractError: naming the target, the installed SGLang and the versions that fit.
    """
    for patch in patches:
        current = _resolve(patch)
        in_force = current is patch.replacement if patch.kind == "value" else _is_wrapped_by(current, patch)
        if not in_force:
            raise _contract_error(patch, "is not in force")


def _is_wrapped_by(current: Any, patch: Patch) -> bool:
    if isinstance(patch.replacement, type):
        return current is patch.replacement
    layer: Callable[..., Any] | None = getattr(current, "__func__", current)
    while layer is not None:
        cells = getattr(layer, "__closure__", None) or ()
        if any(cell.cell_contents is patch.replacement for cell in cells):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def _resolve(patch: Patch) -> Any:
    try:
        return pkgutil.resolve_name(patch.target)
    except (ImportError, AttributeError) as error:
        raise _contract_error(patch, f"was not found ({error})") from error


def _contract_error(patch: Patch, problem: str) -> HostContractError:
    return HostContractError(
        f"{patch.target} {problem} in SGLang {sglang.__version__}; this patch fits {', '.join(patch.versions)}. "
        f"It is needed because: {patch.why} Install a supported SGLang, or see patches/README.md."
    )
