"""The anchors file: what is written is read, and what does not fit is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import AnchorsFile, fingerprint, read_anchors, write_anchors

if TYPE_CHECKING:
    from pathlib import Path

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A writer and a reader that disagree would refuse every calibration."""
    written = write_anchors(tmp_path / "a.json", model={**MODEL, "rope_theta": 1e4}, block_size=16, anchors=[0, 3])
    read = read_anchors(tmp_path / "a.json")
    assert read == written == AnchorsFile(model=MODEL, block_size=16, anchors=(0, 3))
    read.check({**MODEL, "torch_dtype": "float32"}, 16)


def test_a_layer_reads_the_nearest_anchor_at_or_before_it() -> None:
    """An anchor behind a layer has not chosen yet when the layer runs."""
    assert AnchorsFile(model=MODEL, block_size=16, anchors=(0, 3, 4)).sources() == (0, 0, 0, 3, 4, 4)


@pytest.mark.parametrize(
    ("key", "other"),
    [(key, ["OtherForCausalLM"] if key == "architectures" else value + 1) for key, value in MODEL.items()],  # type: ignore[operator]
)
def test_another_model_is_refused_by_the_key_that_differs(key: str, other: Any) -> None:
    """Anchors of another model would silently choose worse blocks."""
    with pytest.raises(ConfigError, match=rf"its {key}\)"):
        AnchorsFile(model=MODEL, block_size=16, anchors=(0,)).check({**MODEL, key: other}, 16)


def test_another_block_size_is_refused() -> None:
    """Similar choices of large blocks say nothing of small ones."""
    with pytest.raises(ConfigError, match="block_size"):
        AnchorsFile(model=MODEL, block_size=16, anchors=(0,)).check(MODEL, 32)


@pytest.mark.parametrize("anchors", [[], [1, 3], [0, 3, 3], [0, 4, 3], [0, 6], [0, "3"], [0, True]])
def test_anchors_that_do_not_hold_together_are_refused(tmp_path: Path, anchors: list[Any]) -> None:
    """Without layer 0 the first layers would have no blocks, and layers past the last would never choose."""
    with pytest.raises(ConfigError, match="its anchors"):
        write_anchors(tmp_path / "a.json", model=MODEL, block_size=16, anchors=anchors)
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        json.dumps({"model": MODEL, "block_size": 16, "anchors": [0]}),
        json.dumps({"format": "sparsespec-anchors-2", "model": MODEL, "block_size": 16, "anchors": [0]}),
        json.dumps({"format": "sparsespec-anchors-1", "model": {}, "block_size": 16, "anchors": [0]}),
        json.dumps({"format": "sparsespec-anchors-1", "model": MODEL, "anchors": [0]}),
        json.dumps({"format": "sparsespec-anchors-1", "model": MODEL, "block_size": "16", "anchors": [0]}),
        json.dumps({"format": "sparsespec-anchors-1", "model": MODEL, "block_size": 16, "anchors": 0}),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    """A file of another kind must fail at start with a sentence, and not in a layer."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match="verify-anchors"):
        read_anchors(tmp_path / "a.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The message must name the path."""
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_anchors(tmp_path / "nowhere.json")


def test_a_fingerprint_of_a_config_is_plain_json() -> None:
    """Tuples of a config object would differ from the lists that JSON gives back."""
    assert fingerprint({**MODEL, "architectures": ("LlamaForCausalLM",)}) == MODEL
