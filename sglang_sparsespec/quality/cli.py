"""The two commands: `measure` and `calibrate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.acceptance.report import about, json_lines
from sglang_sparsespec.errors import ConfigError
from sglang_sparsespec.quality import arguments, plot, report
from sglang_sparsespec.quality.arguments import CROSSED
from sglang_sparsespec.quality.settings import Setting, cross, option
from sglang_sparsespec.sparsity.anchors_file import (
    NOT_CALIBRATED,
    Calibration,
    evenly_spaced,
    weights_digest,
    write_anchors,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sglang_sparsespec.acceptance.model import PagedModel
    from sglang_sparsespec.quality.measure import Quality, Workload

PROGRAM = "sglang_sparsespec.quality"


def load(args: argparse.Namespace) -> PagedModel:
    import torch

    from sglang_sparsespec.acceptance.model import PagedModel

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    # torch prefers cuDNN's attention on Hopper, which makes a plan anew for each shape of a mask: every token here
    torch.backends.cuda.enable_cudnn_sdp(False)
    return PagedModel(args.model, device=args.device, dtype=getattr(torch, args.dtype))


def load_texts(args: argparse.Namespace) -> list[str]:
    """The user's, or half of the built-in ones: what is calibrated on is not measured on."""
    from sglang_sparsespec.model_tools.texts import builtin_texts, read_texts

    if args.texts:
        return read_texts(args.texts)
    texts = builtin_texts()
    half = len(texts) // 2
    return texts[half:] if args.command == "calibrate" else texts[:half]


def workload(args: argparse.Namespace, model: PagedModel, *, room: int) -> Workload:
    """Prefill prompts of text and, to measure, haystacks; `room` is what rounds may write behind a prompt at most."""
    import torch
    from transformers import AutoTokenizer

    from sglang_sparsespec.acceptance.rounds import prefill
    from sglang_sparsespec.model_tools.texts import token_windows
    from sglang_sparsespec.quality.measure import Workload
    from sglang_sparsespec.quality.needles import hide
    from sglang_sparsespec.quality.walk import Requests

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    texts = load_texts(args)
    windows = token_windows(tokenizer, texts, [args.length + args.new_tokens + 1] * args.requests, args.seed)
    prompts = [window[: args.length] for window in windows]
    hidden = []
    if getattr(args, "haystacks", 0):
        straw = token_windows(tokenizer, texts, [args.length] * args.haystacks, args.seed + 1)
        hidden = hide(tokenizer, straw, args.lines, args.seed)
        prompts += [stack.prompt for stack in hidden]
        room = max(room, *(len(line) for stack in hidden for line in stack.lines))
    longest = max(map(len, prompts))
    if longest + room > model.max_context:
        most = args.length - (longest + room - model.max_context)
        raise ConfigError("--length", args.length, f"at most {most} for this model", "Its context ends there.")
    model.allocate(len(prompts), longest + room)
    say(f"prefill of {len(prompts)} prompts, {sum(map(len, prompts))} tokens")
    found = prefill(model, prompts, keep=1)
    next_tokens = found.next_logits.argmax(-1)
    split = args.requests

    def requests(start: int, stop: int) -> Requests:
        return Requests(range(start, stop), found.lens[start:stop], next_tokens[start:stop])

    return Workload(
        texts=requests(0, split),
        ahead=torch.tensor([window[args.length :] for window in windows], device=model.device),
        haystacks=requests(split, len(prompts)) if hidden else None,
        hidden=hidden,
        own_tokens=getattr(args, "own_tokens", 1),
    )


def run_measure(args: argparse.Namespace) -> None:
    settings = cross({name: getattr(args, name) for name, *_ in CROSSED})
    from sglang_sparsespec.quality.measure import baseline, measure
    from sglang_sparsespec.quality.walk import Verifier

    model = load(args)
    for setting in settings:
        # what does not fit the model is refused before anything is run
        Verifier(model, setting)
    work = workload(args, model, room=max(args.new_tokens, args.own_tokens) + 1)
    found: list[Quality] = []
    for number, setting in enumerate(settings, start=1):
        if setting.is_dense:
            base = baseline(model, setting, work)
        quality = measure(model, setting, work, base)
        found.append(quality)
        name = report.setting_name(quality, len(set(args.num_steps)))
        loss = report.plus_minus(*report.mean_and_error(quality.kl), "{:.4f}")
        say(f"{number}/{len(settings)} {name}: KL {loss} ({quality.seconds:.0f} s)")
        append(args, report.records([quality], origin(args)))
    print(report.table(found))
    if args.plot is not None:
        plot.draw(found, args.plot)


def run_calibrate(args: argparse.Namespace) -> None:
    if args.evenly_spaced:
        write_evenly_spaced(args)
        return
    setting = Setting(args.num_steps, args.attention_ratio, args.dense_below, args.block_size)
    if not setting.thins_attention:
        raise ConfigError(option("attention_ratio"), 1.0, "below 1", "With 1 every layer chooses everything.")
    if args.length <= args.dense_below:
        raise ConfigError(option("length"), args.length, f"above --dense-below ({args.dense_below})", "Raise it.")
    from sglang_sparsespec.quality.calibrate import median_expert_ratios, similarity

    model = load(args)
    if not 1 <= args.num_anchors <= model.num_layers:
        raise ConfigError(option("num_anchors"), args.num_anchors, f"1 to {model.num_layers}", "The model's layers.")
    work = workload(args, model, room=args.new_tokens + 1)
    found = similarity(model, setting, work.texts, work.ahead[:, :-1])
    file = write_anchors(
        args.write,
        model=model.model.config.to_dict(),
        block_size=args.block_size,
        anchors=found.anchors(args.num_anchors),
        calibration=Calibration(
            weights=weights_digest(model.model, model.num_layers, model.head_dim),
            ratio=args.attention_ratio,
            dense_below=args.dense_below,
        ),
    )
    reused = found.with_anchor(file.sources())
    print(report.similarity_table(found))
    print(f"\nanchors: {' '.join(map(str, file.anchors))} of {model.num_layers} layers, in {args.write}")
    if reused:
        mean = sum(reused) / len(reused)
        print(f"similarity of a layer with the anchor that it reuses: mean {mean:.2f}, least {min(reused):.2f}")
    medians = median_expert_ratios(model, work.texts, work.ahead[:, :-1])
    if medians:
        print(f"medians for --moe-thresholds: {','.join(f'{median:.3f}' for median in medians)}")
    settings = {name: getattr(args, name) for name in ("num_steps", "attention_ratio", "dense_below", "block_size")}
    matrix = [[round(value, 3) for value in row] for row in found.matrix]
    record = {
        **origin(args),
        **settings,
        "rounds": found.num_rounds,
        "anchors": list(file.anchors),
        "by_chance": round(found.by_chance, 3),
        "similarity": matrix,
        "median_expert_ratios": [round(median, 4) for median in medians],
    }
    append(args, [record])


def run_plot(args: argparse.Namespace) -> None:
    lines = args.records.read_text().splitlines()
    found = [report.quality_of(record) for record in map(json.loads, lines) if "kl_by_text" in record]
    default = {"attention_ratio": 1.0}.get(args.only, 0)
    chosen = [
        quality
        for quality in found
        if not args.only or quality.setting.is_dense or getattr(quality.setting, args.only) not in (default, ())
    ]
    sparse = [quality for quality in chosen if not quality.setting.is_dense]
    # runs are appended to one file, each with a dense setting of its own
    chosen = [*[quality for quality in chosen if quality.setting.is_dense][:1], *sparse]
    if not sparse:
        raise ConfigError("FILE", str(args.records), "records of settings that leave something out", "Measure some.")
    plot.draw(chosen, args.plot)


def write_evenly_spaced(args: argparse.Namespace) -> None:
    """Anchors from the configuration alone: no weights are read, and the file says so."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model, local_files_only=True)
    anchors = evenly_spaced(int(config.num_hidden_layers), args.num_anchors)
    write_anchors(args.write, model=config.to_dict(), block_size=args.block_size, anchors=anchors)
    say(f"anchors {' '.join(map(str, anchors))}, {NOT_CALIBRATED}, in {args.write}")


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """Where numbers come from, and the workload."""
    measured = {
        name: getattr(args, name)
        for name in ("dtype", "requests", "length", "new_tokens", "own_tokens", "haystacks", "lines", "seed")
        if hasattr(args, name)
    }
    return about(args.model, args.device, program=PROGRAM, **measured)


def append(args: argparse.Namespace, records: Sequence[dict[str, Any]]) -> None:
    """Add to the output file, setting by setting: what is measured survives whatever ends the run."""
    if args.output is not None:
        with args.output.open("a") as file:
            file.write(json_lines(records))


def say(text: str) -> None:
    print(f"quality: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments.parse(argv)
    try:
        arguments.check(args)
        {"measure": run_measure, "calibrate": run_calibrate, "plot": run_plot}[args.command](args)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    return 0
