"""Records as the benchmark's runner writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_sparsespec.bench.cells import Contender, Job, Scene


def turn_record(job: Job, contender: Contender, scene: Scene, repeat: int = 0, **result: Any) -> dict[str, Any]:
    """A record as the runner writes it; `result` replaces some of its numbers."""
    baseline = job.contenders[0]
    simulated = None if job.target.has_weights or contender.is_plain else contender.simulated_accept_length
    numbers: dict[str, Any] = {
        "tokens_per_s": 100.0,
        "scheduler_tokens_per_s": None,
        "accept_length": None if contender.is_plain else 4.0,
        "round_ms": 10.0,
        "itl_p50_ms": 5.0,
        "itl_p99_ms": 6.0,
        "chunk_gap_p99_ms": 7.0,
        "running": scene.batch,
        "pool_tokens": 1000.0,
        "pool_used_peak": 1100,
        "pool_size": 2000,
        "gpu_memory_bytes": None,
    } | result
    fill = {name: numbers[name] for name in ("pool_tokens", "running", "tokens_per_s", "round_ms")}
    numbers.setdefault("slices", [fill])
    return {
        "record": "turn",
        "key": f"{contender.name} {scene} {repeat}",
        "context": "now",
        "set": "core",
        "provenance": {
            "date": "2026-11-22",
            "machine": "NVIDIA H100 80GB HBM3",
            "driver": "1",
            "python": "3.11",
            "versions": {"sglang": "0.5.17"},
            "commit": "abc",
            "command": "python -m sglang_sparsespec.bench core",
        },
        "target": job.target.name,
        "dtype": job.target.dtype,
        "shape": vars(job.target.shape),
        "acceptance": "none" if contender.is_plain else "simulated" if simulated else "real",
        "simulated_accept_length": simulated,
        "contender": contender.name,
        "label": contender.label,
        "contender_args": list(contender.args),
        "is_baseline": contender is baseline,
        "baseline": baseline.name,
        "gate_on": job.gate_on,
        "scene": vars(scene),
        "pair": "",
        "repeat": repeat,
        "result": numbers,
    }


def gate_record(job: Job, contender: Contender, *, ok: bool = True) -> dict[str, Any]:
    return {
        "record": "gate",
        "key": f"gate {contender.name}",
        "context": "now",
        "set": "core",
        "provenance": turn_record(job, contender, job.scenes[0])["provenance"],
        "target": job.gate_on,
        "has_weights": True,
        "contender": contender.name,
        "contender_args": list(contender.args),
        "ok": ok,
        "requests": 8,
        "identical": 7,
        "near-tie": 1,
        "diverged": 0 if ok else 1,
        "equal_share": 0.9,
        "tolerance": 0.5,
        "report": "8 requests",
    }
