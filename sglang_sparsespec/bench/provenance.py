"""What every recorded number carries: machine, versions, commit and command."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "SPARSESPEC_COMMIT"
COMMIT_FILE = "COMMIT"
PACKAGE = "sglang_sparsespec"
SOURCES = (".py", ".cu", ".cuh")
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers", "sglang-sparsespec")


def provenance(*, use_gpu: bool = True) -> dict[str, Any]:
    """Versions of what matters, the card if there is one and it is used, and the command line."""
    import torch

    on_gpu = use_gpu and torch.cuda.is_available()
    processor = f"CPU, {len(os.sched_getaffinity(0))} cores, {cpu_name()}"
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else processor,
        "driver": driver() if on_gpu else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "sources": sources_digest(),
        "command": command(sys.argv),
    }


def driver() -> str | None:
    """Of the cards, which nvidia-smi names one by one."""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return None if versions is None else ", ".join(dict.fromkeys(versions.split()))


def command(argv: list[str]) -> str:
    """The command line as someone else would type it: a module's file as `-m`, a script below the checkout's root."""
    script = Path(argv[0])
    if script.name == "__main__.py" and PACKAGE in script.parts:
        start = len(script.parts) - 1 - script.parts[::-1].index(PACKAGE)
        return " ".join(["python", "-m", ".".join(script.parts[start:-1]), *argv[1:]])
    if script.is_absolute() and script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return " ".join(["python", str(script), *argv[1:]])


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def commit(root: Path = ROOT) -> str:
    """The commit of this code: SPARSESPEC_COMMIT, git ("-dirty" if files differ), a file COMMIT, or unknown.

    The variable and the file are for copies without `.git`: `git rev-parse --short HEAD > COMMIT` before copying.
    """
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    # a copy inside some other repository must not report that one's commit
    if (root / ".git").exists():
        revision = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
        if revision:
            changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
            return revision + ("-dirty" if changed else "")
    try:
        return (root / COMMIT_FILE).read_text().strip() or "unknown"
    except OSError:
        return "unknown"


def sources_digest(package: Path = ROOT / PACKAGE) -> str:
    """Sixteen hex digits of the code that runs.

    A commit does not tell two edits of one checkout apart, nor two copies without any.
    """
    folders = [package]
    if not (package / "patches").is_dir():
        # a checkout: see the package's __init__
        folders += [package.parent / "patches", package.parent / "kernels"]
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES:
                content = path.read_bytes()
                found.update(f"{path.relative_to(package.parent)} {len(content)}\n".encode())
                found.update(content)
    return found.hexdigest()[:16]


def cpu_name() -> str:
    """The model name that Linux gives, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str | None:
    """Standard output of a command; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
