"""What studies share before they begin: the model that a user names, the file that results go to, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_book import Book

from sglang_sparsespec.bench.cells import Target
from sglang_sparsespec.bench.cli import CONTEXT
from sglang_sparsespec.bench.provenance import provenance
from sglang_sparsespec.bench.server import has_gpu
from sglang_sparsespec.bench.shapes import SHAPES, read_shape, write_shape

if TYPE_CHECKING:
    import argparse

MET, MISSED, TIME_IS_UP = 0, 1, 3
TINY_CONTEXT = 8192


def add_target(parser: argparse.ArgumentParser) -> None:
    """One of --model, --shape and --tiny, for `target_of`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="real weights, real acceptance")
    model.add_argument("--shape", choices=sorted(SHAPES), help="random weights, simulated acceptance")
    model.add_argument("--tiny", action="store_true", help="a tiny random model, simulated acceptance")


def target_of(args: argparse.Namespace, folder: Path) -> Target:
    """The model to serve; a shape's and a tiny one's files are written to `folder`."""
    path = args.model
    if args.shape:
        path = write_shape(args.shape, folder / args.shape)
    elif args.tiny:
        from sglang_sparsespec.model_tools.tiny import write_tiny_model

        path = write_tiny_model(folder / "tiny", context=TINY_CONTEXT)
    dtype = "bfloat16" if has_gpu() else "float32"
    return Target(path.name, str(path), dtype, read_shape(path), has_weights=args.model is not None)


def open_book(args: argparse.Namespace, options: list[Any], facts: dict[str, Any]) -> Book:
    """The file of results.

    Args:
        args: of the command: its model, and `json`.
        options: what decides numbers besides the machine, the code and the model.
        facts: written on each line beside the provenance.
    """
    found = provenance()
    # one rank
    context = {name: found[name] for name in CONTEXT if name in found}
    context["model"] = args.shape or ("tiny" if args.tiny else str(args.model.resolve()))
    context["options"] = options
    return Book(args.json, context, {**facts, "provenance": found})
