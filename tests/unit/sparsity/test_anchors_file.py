"""The anchors file: what is written is read, and what does not fit is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.sparsity.anchors_file import (
    AnchorsFile,
    Calibration,
    evenly_spaced,
    fingerprint,
    read_anchors,
    weights_digest,
    write_anchors,
)

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


CALIBRATION = Calibration(weights="0123456789abcdef", ratio=0.25, dense_below=1024)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A writer and a reader that disagree would refuse every calibration."""
    for found in (None, CALIBRATION):
        written = write_anchors(
            tmp_path / "a.json",
            model={**MODEL, "rope_theta": 1e4},
            block_size=16,
            anchors=[0, 3],
            calibration=found,
        )
        read = read_anchors(tmp_path / "a.json")
        assert read == written == AnchorsFile(model=MODEL, block_size=16, anchors=(0, 3), calibration=found)
        read.check({**MODEL, "torch_dtype": "float32"}, 16)
        assert ("evenly spaced, not calibrated" in (tmp_path / "a.json").read_text()) == (found is None)


def test_evenly_spaced_anchors() -> None:
    """Anchors that bunch up at one end."""
    assert evenly_spaced(36, 9) == tuple(range(0, 36, 4))
    assert evenly_spaced(7, 3) == (0, 2, 4)
    assert evenly_spaced(3, 3) == (0, 1, 2)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        evenly_spaced(3, 4)


def test_other_weights_are_refused() -> None:
    """A fine-tuned model has the shape of its base, and may choose in other layers."""
    file = AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=CALIBRATION)
    file.check_weights(CALIBRATION.weights)
    with pytest.raises(ConfigError, match=r"its weights\) is '0123456789abcdef'; it must be the served model's fed"):
        file.check_weights("fedcba9876543210")
    # evenly spaced anchors are nobody's
    AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=None).check_weights("fedcba9876543210")


def test_another_rule_raises_doubts() -> None:
    """Anchors of another budget work, and may be worse: neither silence nor a refusal."""
    file = AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=CALIBRATION)
    assert file.doubts(0.25, 1024) == ""
    assert file.doubts(0.25, 4096) == file.doubts(0.5, 1024) == "calibrated with rho 0.25 and L0 1024"
    plain = AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=None)
    assert plain.doubts(0.25, 1024) == "evenly spaced, not calibrated"


class Layers(torch.nn.Module):
    """Parameters with the names of a Hugging Face decoder, as stored in `dtype`."""

    def __init__(self, weights: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()
        for weight in weights.to(dtype):
            layer = torch.nn.Module()
            layer.self_attn = torch.nn.Module()
            layer.self_attn.o_proj = torch.nn.Linear(8, 8, bias=False)
            layer.self_attn.o_proj.weight = torch.nn.Parameter(weight)
            self.model.layers.append(layer)


def test_a_digest_is_of_the_checkpoint_and_not_of_the_dtype() -> None:
    """A calibration in float32 must be served in bfloat16, by ranks that hold a part of the heads each."""
    weights = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-7, 1)
    # as a checkpoint would hold them
    weights = weights.bfloat16().float()
    digests = {weights_digest(Layers(weights, dtype), 4, 4) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert len(digests) == 1
    assert weights_digest(Layers(weights[:, :, :4], torch.float32), 4, 4) in digests
    for layer in (0, 2, 3):
        other = weights.clone()
        other[layer, 1, 3] *= 1.01
        assert weights_digest(Layers(other, torch.float32), 4, 4) not in digests
    with pytest.raises(ConfigError, match=r"no model\.layers"):
        weights_digest(torch.nn.Linear(2, 2), 4, 4)


def test_a_layer_reads_the_nearest_anchor_at_or_before_it() -> None:
    """An anchor behind a layer has not chosen yet when the layer runs."""
    assert AnchorsFile(model=MODEL, block_size=16, anchors=(0, 3, 4), calibration=None).sources() == (0, 0, 0, 3, 4, 4)


@pytest.mark.parametrize(
    ("key", "other"),
    [(key, ["OtherForCausalLM"] if key == "architectures" else value + 1) for key, value in MODEL.items()],  # type: ignore[operator]
)
def test_another_model_is_refused_by_the_key_that_differs(key: str, other: Any) -> None:
    """Anchors of another model would silently choose worse blocks."""
    with pytest.raises(ConfigError, match=rf"its {key}\)"):
        AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=None).check({**MODEL, key: other}, 16)


def test_another_block_size_is_refused() -> None:
    """Similar choices of large blocks say nothing of small ones."""
    with pytest.raises(ConfigError, match="block_size"):
        AnchorsFile(model=MODEL, block_size=16, anchors=(0,), calibration=None).check(MODEL, 32)


@pytest.mark.parametrize("anchors", [[], [1, 3], [0, 3, 3], [0, 4, 3], [0, 6], [0, "3"], [0, True]])
def test_anchors_that_do_not_hold_together_are_refused(tmp_path: Path, anchors: list[Any]) -> None:
    """Without layer 0 the first layers would have no blocks, and layers past the last would never choose."""
    with pytest.raises(ConfigError, match="its anchors"):
        write_anchors(tmp_path / "a.json", model=MODEL, block_size=16, anchors=anchors)
    assert not (tmp_path / "a.json").exists()


CONTENT = {
    "format": "sparsespec-anchors-2",
    "model": MODEL,
    "block_size": 16,
    "anchors": [0],
    "calibration": "evenly spaced, not calibrated",
}


def test_the_content_that_the_cases_below_spoil_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CONTENT))
    assert read_anchors(tmp_path / "a.json").anchors == (0,)


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        json.dumps({name: value for name, value in CONTENT.items() if name != "format"}),
        json.dumps({**CONTENT, "format": "sparsespec-anchors-1"}),
        json.dumps({**CONTENT, "model": {}}),
        json.dumps({name: value for name, value in CONTENT.items() if name != "block_size"}),
        json.dumps({**CONTENT, "block_size": "16"}),
        json.dumps({**CONTENT, "anchors": 0}),
        json.dumps({name: value for name, value in CONTENT.items() if name != "calibration"}),
        json.dumps({**CONTENT, "calibration": "by eye"}),
        json.dumps({**CONTENT, "calibration": {"weights": "0", "ratio": 0.5}}),
        json.dumps({**CONTENT, "calibration": {"weights": "", "ratio": 0.5, "dense_below": 0}}),
        json.dumps({**CONTENT, "calibration": {"weights": "0", "ratio": 1.5, "dense_below": 0}}),
        json.dumps({**CONTENT, "calibration": {"weights": "0", "ratio": 0.5, "dense_below": -1}}),
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
