"""The anchors file: which layers choose their own KV blocks in a sparse verify, and for which model that was found.

A JSON object, written by a calibration on text and read by a server. Knows nothing of how anchors are found.
Source: inter-layer reuse of arXiv:2512.21911. Invariant: an AnchorsFile is valid, because construction validates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT: Final = "sparsespec-anchors-1"
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
_ADVICE: Final = "Make one for this model with the calibration command (docs/lossy.md), or leave it out."


def fingerprint(config: Mapping[str, Any]) -> dict[str, Any]:
    """MODEL_KEYS of a Hugging Face config (its `to_dict()`); a missing key becomes None."""
    chosen = {key: config.get(key) for key in MODEL_KEYS}
    if chosen["architectures"] is not None:
        chosen["architectures"] = list(chosen["architectures"])
    return chosen


@dataclass(frozen=True, kw_only=True)
class AnchorsFile:
    """What such a file says."""

    model: dict[str, Any]
    """MODEL_KEYS of the model it was made on."""
    block_size: int
    """Tokens of a KV block, as in the calibration."""
    anchors: tuple[int, ...]
    """Layers that choose, ascending; the first is 0. The others read what the last anchor before them chose."""

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
        model=content["model"], block_size=content.get("block_size", 0), anchors=tuple(content["anchors"])
    )


def write_anchors(
    path: str | Path, *, model: Mapping[str, Any], block_size: int, anchors: Sequence[int]
) -> AnchorsFile:
    """Write a file; `model` is a Hugging Face config or its MODEL_KEYS.

    Raises:
        ConfigError: if what is to be written does not hold together; nothing is written then.
        OSError: if the file cannot be written.
    """
    made = AnchorsFile(model=fingerprint(model), block_size=block_size, anchors=tuple(anchors))
    content = {"format": FORMAT, "model": made.model, "block_size": made.block_size, "anchors": list(made.anchors)}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return made


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _invalid(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{OPTION} (its {name})", value, allowed, _ADVICE)
