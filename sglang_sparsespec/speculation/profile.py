"""What a controller has learnt, as a file: a warm start for the next server of the same model on the same card.

JSON: a format number, the identity of the server (model, card, options that rounds cost by), decayed sums of round
times by batch bucket and k, and of acceptance by position. Loaded values count as few rounds, so that a server soon
trusts its own. Knows nothing of SGLang.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.speculation.round_times import RoundTimes, StepTimes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sglang_sparsespec.speculation.controller import Controller

FORMAT: Final = 1
OPTION: Final = "--sparsespec-profile"
# rounds, and trials of a position, that loaded values count for
_TIME_WEIGHT, _TRIAL_WEIGHT = 6.0, 32.0
_SUMS: Final = ("weight", "pool", "pool_squared", "time", "time_pool")

Identity = dict[str, str]


def check_path(path: str) -> None:
    """Raise unless there is a profile at `path`, or one can be written there.

    Raises:
        ConfigError: otherwise.
    """
    file = Path(path)
    if file.exists():
        read(path)
    elif not os.access(file.parent, os.W_OK):
        raise ConfigError(
            OPTION, path, "a profile, or a file in a folder that can be written to", "Make the folder, or name another."
        )


def read(path: str) -> dict[str, Any]:
    """The contents of a profile.

    Raises:
        ConfigError: it is none.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise _invalid(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _invalid(path, f"its format is not {FORMAT}")
    identity, batches, acceptance = data.get("identity"), data.get("batches"), data.get("acceptance")
    if not isinstance(identity, dict) or not all(isinstance(value, str) for value in identity.values()):
        raise _invalid(path, "identity is not an object of strings")
    if not isinstance(batches, dict) or not isinstance(acceptance, dict):
        raise _invalid(path, "batches or acceptance is not an object")
    for bucket, steps in batches.items():
        if not bucket.isdecimal() or not isinstance(steps, dict):
            raise _invalid(path, f"batches.{bucket} is not an object under a number")
        for k, sums in steps.items():
            if not k.isdecimal() or not _are_sums(sums):
                raise _invalid(path, f"batches.{bucket}.{k} does not have {', '.join(_SUMS)} as positive numbers")
    trials: list[float] = acceptance.get("trials", [])
    correct: list[float] = acceptance.get("correct", [])
    if not _are_numbers(trials) or not _are_numbers(correct) or len(trials) != len(correct):
        raise _invalid(path, "acceptance.trials and acceptance.correct are not lists of as many numbers")
    if any(stood > tried for stood, tried in zip(correct, trials, strict=True)):
        raise _invalid(path, "acceptance.correct exceeds acceptance.trials")
    return data


def load(path: str, identity: Identity, controller: Controller) -> bool:
    """Start a new controller from the profile at `path`; False where there is none yet.

    Raises:
        ConfigError: it is none, or of another server.
    """
    if not Path(path).exists():
        return False
    data = read(path)
    for name in sorted(identity.keys() | data["identity"].keys()):
        ours, theirs = identity.get(name), data["identity"].get(name)
        if ours != theirs:
            raise ConfigError(
                f"{OPTION} {path}: {name}",
                theirs,
                f"{ours!r}, as this server has it",
                "Name another file; a new one is written where there is none.",
            )
    for bucket, steps in data["batches"].items():
        times = RoundTimes()
        for k, sums in steps.items():
            seen = StepTimes(**{name: float(sums[name]) for name in _SUMS})
            seen.fade(min(1.0, _TIME_WEIGHT / seen.weight))
            times.restore(int(k), seen)
        if times.steps:
            controller.times.buckets[int(bucket)] = times
    rates = controller.rates
    trials, correct = data["acceptance"]["trials"], data["acceptance"]["correct"]
    for position, (tried, stood) in enumerate(zip(trials[: len(rates.trials)], correct, strict=False)):
        share = min(1.0, _TRIAL_WEIGHT / tried) if tried > 0 else 0.0
        rates.trials[position], rates.correct[position] = share * tried, share * stood
    return True


def save(path: str, identity: Identity, controller: Controller) -> None:
    """Write what `controller` knows; readers see the old file or the new one, never a part."""
    data = {
        "format": FORMAT,
        "identity": identity,
        "batches": {
            str(bucket): {str(k): {name: getattr(seen, name) for name in _SUMS} for k, seen in times.steps.items()}
            for bucket, times in controller.times.buckets.items()
            if times.steps
        },
        "acceptance": {"trials": controller.rates.trials, "correct": controller.rates.correct},
    }
    partial = Path(f"{path}.{os.getpid()}.part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def _are_sums(sums: Any) -> bool:
    if not isinstance(sums, dict) or set(sums) != set(_SUMS) or not _are_numbers([*sums.values()]):
        return False
    return sums["weight"] > 0 and sums["time"] > 0


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        for value in values
    )


def _invalid(path: str, problem: str) -> ConfigError:
    return ConfigError(
        OPTION, path, f"a profile that a server has written ({problem})", "Delete the file, or name another."
    )


def describe(controller: Controller) -> Mapping[str, Any]:
    """What an operator may want to see of a controller, in JSON's types."""
    status = controller.status
    costs = {bucket: times.cost for bucket, times in sorted(controller.times.buckets.items())}
    return {
        "num_steps": status.num_steps,
        "reason": status.reason,
        "predicted_speedup": status.predicted_speedup,
        "measured_speedup": status.measured_speedup,
        "survival": [round(alive, 4) for alive in controller.rates.survival()],
        "terms_by_batch": {str(1 << bucket): vars(cost) for bucket, cost in costs.items() if cost is not None},
    }
