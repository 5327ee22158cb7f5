"""What every recorded number carries: machine, versions, commit and command."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Versions of what matters, the card if there is one, and the command line."""
    import torch

    packages = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": card,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "command": " ".join(["python", *sys.argv]),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
