"""The command line of both commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.acceptance.plot import check_available
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.quality.needles import NAMES
from sglang_sparsespec.quality.settings import EVERY_LAYER, option

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION = """What sparse computation in a verify does to the output of a local Llama, Qwen or Mixtral checkpoint.

    python -m sglang_sparsespec.quality calibrate MODEL --write anchors.json --num-anchors 8
    python -m sglang_sparsespec.quality measure MODEL --attention-ratio 0 0.25 --dense-below 512 1024
    python -m sglang_sparsespec.quality measure MODEL --ffn-threshold 0.01 0.05 0.1

`measure` crosses options with several values and prints a table; `calibrate` finds anchor layers; `plot` draws what
`measure` wrote; see
docs/lossy_quality.md.
"""


def numbers(text: str) -> tuple[float, ...]:
    """ "0.05,0.12" -> (0.05, 0.12); "none" -> ()."""
    return () if text == "none" else tuple(float(part) for part in text.split(","))


# settings that are crossed: (field of Setting, type, default, help)
CROSSED: tuple[tuple[str, Any, list[Any], str], ...] = (
    ("num_steps", int, [8], "k; a verify of k+1 tokens shares the first one's blocks"),
    ("attention_ratio", float, [1.0], "rho: share of the KV beyond L0 that is read; 1 reads all"),
    ("dense_below", int, [1024], "L0, tokens"),
    ("block_size", int, [16], "of KV, tokens"),
    ("anchors", str, [EVERY_LAYER], f"files of `calibrate`, or {EVERY_LAYER}"),
    ("ffn_threshold", float, [0.0], "tau: drop channels below it"),
    ("moe_thresholds", numbers, [()], "beta_1,beta_2,..: skip the lowest experts of a token; none"),
    ("moe_top_k", int, [0], "experts of a token; 0: as the model says"),
    ("dense_every", int, [0], "each n-th verify is dense; 0: none"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_sparsespec.quality",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="KL, agreement, perplexity, greedy output and recall by setting")
    _add_common(measured, requests=8, new_tokens=90)
    measured.add_argument("--own-tokens", type=int, default=48, help="written greedily (default: 48)")
    measured.add_argument("--haystacks", type=int, default=4, help="texts with lines to recall (default: 4; 0: none)")
    measured.add_argument("--lines", type=int, default=8, help=f"in each, at most {len(NAMES)} (default: 8)")
    crossed = measured.add_argument_group("settings, crossed; a dense one comes first by itself")
    for name, kind, default, text in CROSSED:
        shown = " ".join(map(str, default)) if default != [()] else "none"
        crossed.add_argument(option(name), type=kind, nargs="+", default=default, help=f"{text} (default: {shown})")
    measured.add_argument("--plot", type=Path, help="picture; needs matplotlib")

    calibrated = commands.add_parser("calibrate", help="find anchor layers")
    _add_common(calibrated, requests=8, new_tokens=72)
    calibrated.add_argument("--write", type=Path, required=True, metavar="FILE", help="the anchors file")
    calibrated.add_argument("--num-anchors", type=int, required=True, help="layers that choose for themselves")
    calibrated.add_argument(
        "--evenly-spaced",
        action="store_true",
        help="do not calibrate: layers at equal distances, for a shape without weights; the file says so",
    )
    for name in ("num_steps", "dense_below", "block_size", "attention_ratio"):
        kind, default, text = next(rest for field, *rest in CROSSED if field == name)
        value = 0.25 if name == "attention_ratio" else default[0]
        calibrated.add_argument(option(name), type=kind, default=value, help=f"{text} (default: {value})")

    drawn = commands.add_parser("plot", help="a picture from records of `measure`")
    drawn.add_argument("records", type=Path, metavar="FILE", help="JSON lines of one workload, dense settings included")
    drawn.add_argument("--plot", type=Path, required=True, help="picture; needs matplotlib")
    drawn.add_argument(
        "--only", default="", metavar="FIELD", help="settings that use this one, such as ffn_threshold; and dense ones"
    )
    return parser.parse_args(argv)


def _add_common(parser: argparse.ArgumentParser, *, requests: int, new_tokens: int) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--texts", type=Path, nargs="+", help=".txt or .jsonl; default: Python's sources and manual")
    parser.add_argument("--requests", type=int, default=requests, help=f"prompts (default: {requests})")
    parser.add_argument("--length", type=int, default=2048, help="prompt tokens, prefilled dense (default: 2048)")
    parser.add_argument(
        "--new-tokens", type=int, default=new_tokens, help=f"of text behind each prompt (default: {new_tokens})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default=None, help="float32 (default on cpu), bfloat16 (default on cuda), float16")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before a model is loaded.

    Raises:
        ConfigError: naming the option.
    """
    if args.command == "plot":
        check_available()
        if args.only not in ("", *(name for name, *_ in CROSSED)):
            allowed = ", ".join(name for name, *_ in CROSSED)
            raise ConfigError("--only", args.only, f"one of {allowed}", "Or leave it out.")
        return
    lows = [("requests", 1), ("length", 1), ("new_tokens", 1), ("threads", 1)]
    if args.command == "measure":
        lows += [("own_tokens", 1), ("haystacks", 0), ("lines", 1)]
        if args.lines > len(NAMES):
            raise ConfigError("--lines", args.lines, f"at most {len(NAMES)}", "There are no more names.")
        if args.plot is not None:
            check_available()
    for name, low in lows:
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(option(name), value, f"at least {low}", "Raise it.")
