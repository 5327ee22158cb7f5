"""The anchors file: which layers choose their own KV blocks in a sparse verify, and for which model that was found.

A JSON object, written by a calibration on text and read by a server. Knows nothing of how anchors are found.
Source: inter-layer reuse of arXiv:2512.21911. Invariant: an AnchorsFile is valid, because construction validates.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

FORMAT: Final = "sparsespec-anchors-2"
OPTION: Final = "--sparsespec-verify-anchors"
# what tells one model from another here: names of a Hugging Face config
MODEL_KEYS: Final = (
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
NOT_CALIBRATED: Final = "evenly spaced, not calibrated"
_ADVICE: Final = "Make one for this model with the calibration command (docs/lossy.md), or leave it out."
# below it float16 cannot hold every bfloat16, and digests of one checkpoint would depend on the dtype
_SMALLEST: Final = 2.0**-16


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """MODEL_KEYS of a Hugging Face config (its `to_dict()`); a missing key becomes None."""
    chosen = {key: config.get(key) for key in MODEL_KEYS}
    if chosen["architectures"] is not None:
        chosen["architectures"] = list(chosen["architectures"])
    return chosen


def evenly_spaced(num_layers: int, num_anchors: int) -> tuple[int, ...]:
    """So many anchors at equal distances, the first 0: what there is where nothing can be calibrated.

    Raises:
        ValueError: for a number of anchors that is not 1 to `num_layers`.
    """
    if not 1 <= num_anchors <= num_layers:
        raise ValueError(f"{num_anchors} anchors of {num_layers} layers; expected 1 to {num_layers}.")
    return tuple(i * num_layers // num_anchors for i in range(num_anchors))


def weights_digest(model: torch.nn.Module, num_layers: int, head_dim: int) -> str:
    """What tells a checkpoint from others of its shape: some attention weights of three layers, as 16 hex digits.

    Weights are compared as bfloat16, so that it does not matter in which dtype a model was loaded; and only those of
    the first head, which the first of several ranks holds. Names are those of Hugging Face, which SGLang keeps here.

    Raises:
        ConfigError: for a model without weights of these names.
    """
    import torch

    digest, parameters = hashlib.sha256(), dict(model.named_parameters())
    for layer in sorted({0, num_layers // 2, num_layers - 1}):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        if name not in parameters:
            raise _invalid("weights", f"compared with a model that has no {name}", "a Llama, Qwen or Mixtral")
        values = parameters[name].detach()[:, :head_dim].to(torch.bfloat16)
        values = values.masked_fill(values.abs() < _SMALLEST, 0)
        digest.update(values.contiguous().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What anchors were found on and for."""

    weights: str
    """`weights_digest` of the model."""
    ratio: float
    """rho of the choices that were compared."""
    dense_below: int
    """L0 of them."""

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str) or not self.weights:
            raise _invalid("weights", self.weights, "a digest")
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not 0 <= self.ratio <= 1:
            raise _invalid("ratio", self.ratio, "0 to 1")
        if not _is_int(self.dense_below) or self.dense_below < 0:
            raise _invalid("dense_below", self.dense_below, "an integer of at least 0")


@dataclass(frozen=True, kw_only=True)
class AnchorsFile:
    """What such a file says."""

    model: dict[str, Any]
    """MODEL_KEYS of the model it was made on."""
    block_size: int
    """Tokens of a KV block, as in the calibration."""
    anchors: tuple[int, ...]
    """Layers that choose, ascending; the first is 0. The others read what the last anchor before them chose."""
    calibration: Calibration | None
    """None: evenly spaced, for any weights."""

    def __post_init__(self) -> None:
        if set(self.model) != set(MODEL_KEYS):
            raise _invalid("model", sorted(self.model), f"an object with {', '.join(MODEL_KEYS)}")
        num_layers = self.model["num_hidden_layers"]
        if not _is_int(num_layers) or num_layers < 1:
            raise _invalid("num_hidden_layers", num_layers, "an integer of at least 1")
        if not _is_int(self.block_size) or self.block_size < 1:
            raise _invalid("block_size", self.block_size, "an integer of at least 1")
        anchors = list(self.anchors)
        is_ascending = all(_is_int(layer) for layer in anchors) and anchors == sorted(set(anchors))
        if not is_ascending or anchors[:1] != [0] or anchors[-1] >= num_layers:
            raise _invalid("anchors", anchors, f"layers below {num_layers}, ascending, the first of them 0")

    def check(self, model: Mapping[str, Any], block_size: int) -> None:
        """Refuse to serve another model, or blocks of another size.

        Args:
            model: the served model's Hugging Face config, or its MODEL_KEYS.
            block_size: of the server.

        Raises:
            ConfigError: naming what differs.
        """
        served = fingerprint(model)
        for key in MODEL_KEYS:
            if self.model[key] != served[key]:
                raise ConfigError(
                    f"{OPTION} (its {key})", self.model[key], f"the served model's {served[key]!r}", _ADVICE
                )
        if self.block_size != block_size:
            raise ConfigError(
                f"{OPTION} (its block_size)", self.block_size, f"the server's block size ({block_size})", _ADVICE
            )

    def check_weights(self, digest: str) -> None:
        """Refuse other weights of the same shape.

        Args:
            digest: `weights_digest` of the served model.

        Raises:
            ConfigError: if the anchors were found on another checkpoint.
        """
        if self.calibration is not None and self.calibration.weights != digest:
            allowed = f"the served model's {digest}"
            raise ConfigError(f"{OPTION} (its weights)", self.calibration.weights, allowed, _ADVICE)

    def doubts(self, ratio: float, dense_below: int) -> str:
        """Why these anchors may not be the best for a rule, in words; empty if nothing speaks against them."""
        found = self.calibration
        if found is None:
            return NOT_CALIBRATED
        if (found.ratio, found.dense_below) != (ratio, dense_below):
            return f"calibrated with rho {found.ratio:g} and L0 {found.dense_below}"
        return ""

    def sources(self) -> tuple[int, ...]:
        """[num_layers]: for each layer the anchor whose blocks it reads, the nearest at or before it."""
        latest, found = 0, []
        for layer in range(self.model["num_hidden_layers"]):
            latest = layer if layer in self.anchors else latest
            found.append(latest)
        return tuple(found)


def read_anchors(path: str | Path) -> AnchorsFile:
    """Read and validate a file.

    Raises:
        ConfigError: if it cannot be read, is not such a file, or does not hold together.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _invalid("file", f"{path} ({error})", "a readable JSON file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _invalid("format", found, FORMAT)
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("anchors"), list):
        raise _invalid("file", str(path), "an object with model, block_size and anchors")
    return AnchorsFile(
        model=content["model"],
        block_size=content.get("block_size", 0),
        anchors=tuple(content["anchors"]),
        calibration=_calibration(content.get("calibration")),
    )


def _calibration(found: object) -> Calibration | None:
    if found == NOT_CALIBRATED:
        return None
    names = {field.name for field in fields(Calibration)}
    if not isinstance(found, dict) or set(found) != names:
        raise _invalid("calibration", found, f"an object with {', '.join(sorted(names))}, or '{NOT_CALIBRATED}'")
    return Calibration(**found)


def write_anchors(
    path: str | Path,
    *,
    model: Mapping[str, Any],
    block_size: int,
    anchors: Sequence[int],
    calibration: Calibration | None = None,
) -> AnchorsFile:
    """Write a file; without `calibration` it says that none was made.

    Args:
        path: of the file.
        model: a Hugging Face config or its MODEL_KEYS.
        block_size: tokens of a KV block.
        anchors: see AnchorsFile.
        calibration: what they were found on.

    Raises:
        ConfigError: if what is to be written does not hold together; nothing is written then.
        OSError: if the file cannot be written.
    """
    made = AnchorsFile(model=fingerprint(model), block_size=block_size, anchors=tuple(anchors), calibration=calibration)
    content = {
        "format": FORMAT,
        "model": made.model,
        "block_size": made.block_size,
        "anchors": list(made.anchors),
        "calibration": NOT_CALIBRATED if calibration is None else asdict(calibration),
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return made


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{OPTION} (its {name})", value, allowed, _ADVICE)
