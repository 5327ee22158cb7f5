"""What this machine can run: the card, its memory, and the attention backends that are installed. Imports no SGLang."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sglang_sparsespec.errors import ConfigError

GPU_BACKENDS = ("flashinfer", "triton", "fa3")
CPU_BACKENDS = ("torch_native", "intel_amx")


@dataclass(frozen=True)
class Machine:
    name: str
    has_gpu: bool
    memory_bytes: int
    """Of the card, of all cards that a server is spread over, or of the host."""
    backends: tuple[str, ...]
    """Attention backends that plain SGLang can use here; the first is the one that SPARSESPEC takes by itself."""
    missing: dict[str, str] = field(default_factory=dict)
    """Backend -> why it cannot be used here."""
    tp_size: int = 1
    """Ranks of every server here, plain or not; on a GPU machine each has a card of its own."""


def detect(device: str | None = None, tp_size: int = 1) -> Machine:
    """This machine; `device="cpu"` leaves its cards out of account.

    Raises:
        ConfigError: if there are fewer cards than ranks.
    """
    import torch

    if device != "cpu" and torch.cuda.is_available():
        if tp_size > torch.cuda.device_count():
            raise ConfigError("--tp-size", tp_size, f"at most {torch.cuda.device_count()}, the cards here", "Lower it.")
        properties = torch.cuda.get_device_properties(0)
        missing = _missing_gpu_backends((properties.major, properties.minor))
        return Machine(
            name=properties.name,
            has_gpu=True,
            memory_bytes=tp_size * properties.total_memory,
            backends=tuple(backend for backend in GPU_BACKENDS if backend not in missing),
            missing=missing,
            tp_size=tp_size,
        )
    return Machine(
        name="CPU",
        has_gpu=False,
        memory_bytes=psutil.virtual_memory().total,
        backends=("torch_native",),
        missing={
            "intel_amx": "it needs SGLang's own CPU build (SGLANG_USE_CPU_ENGINE), and the plugin serves without it",
            **{backend: "it needs a GPU" for backend in GPU_BACKENDS},
        },
        tp_size=tp_size,
    )


def _missing_gpu_backends(capability: tuple[int, int]) -> dict[str, str]:
    missing = {}
    if importlib.util.find_spec("flashinfer") is None:
        missing["flashinfer"] = "flashinfer-python is not installed"
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "triton is not installed"
    spec = importlib.util.find_spec("sgl_kernel")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not any(list(folder.glob("flash_ops*.so")) for folder in folders):
        missing["fa3"] = "sgl_kernel has no flash_ops library here"
    elif capability[0] != 9:
        missing["fa3"] = f"it serves cards of compute capability 9; this one has {capability[0]}.{capability[1]}"
    return missing


def gpu_memory_bytes(pid: int) -> int | None:
    """Memory that a process and its children hold on the cards; None where nvidia-smi does not say.

    Inside a container nvidia-smi may show the process ids of the host; then this is None as well.
    """
    try:
        text = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        tree = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except (OSError, subprocess.SubprocessError, psutil.NoSuchProcess):
        return None
    used = []
    for line in text.splitlines():
        owner, _, mebibytes = (part.strip() for part in line.partition(","))
        if owner.isdigit() and int(owner) in tree and mebibytes.isdigit():
            used.append(int(mebibytes) << 20)
    return sum(used) if used else None


def load_average() -> float:
    """Processes that wanted a core over the last minute, per core: above 1 the machine is not quiet."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))
