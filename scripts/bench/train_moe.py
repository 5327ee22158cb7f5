"""A small mixture of experts whose routers mean something, trained in minutes on text that ships with Python.

    python scripts/bench/train_moe.py --out DIR     # 4 layers of 16 experts, 4 a token; about 20 minutes on two cores
    python -m sglang_sparsespec.quality measure DIR --length 400 --moe-top-k 0 3 2 1

What rules that leave experts out do to a model cannot be seen with random weights, and no published mixture is small
enough for a laptop. One token is a byte. Trained on the modules of the standard library and on the part of the manual
that `quality calibrate` reads: none of the text that `quality measure` and `acceptance` read by themselves.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sglang_sparsespec.model_tools.texts import SOURCES, builtin_texts
from sglang_sparsespec.model_tools.tiny import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

PEAK_RATE, WEIGHT_DECAY, WARM_STEPS, LAST_SHARE = 2e-3, 0.05, 50, 0.05
# keeps routers from sending everything to few experts; Switch Transformer (arXiv:2101.03961) and Qwen3's default
BALANCE = 0.001
# of the windows; there is far less prose than code
PROSE_SHARE = 0.15
SHOW_EVERY = 50


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-per-token", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def training_texts() -> tuple[bytes, bytes]:
    """(code, prose), without what is measured on."""
    texts = builtin_texts()
    # modules at even places, the manual at odd ones: see `builtin_texts`
    prose = texts[len(texts) // 2 :][1::2]
    measured = {name.replace(".", "/") + ".py" for name in SOURCES}
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    code = [path.read_bytes() for path in files if path.relative_to(library).as_posix() not in measured]
    return b"\n\n".join(code), "\n\n".join(prose).encode()


def batch_of(texts: Sequence[torch.Tensor], size: int, window: int, rng: random.Random) -> torch.Tensor:
    """[size, window], int64."""
    rows = []
    for _ in range(size):
        text = texts[rng.random() < PROSE_SHARE]
        start = rng.randrange(len(text) - window)
        rows.append(text[start : start + window])
    return torch.stack(rows).long()


def rate_share(step: int, steps: int) -> float:
    """Of PEAK_RATE: a linear rise, then half a cosine."""
    if step < WARM_STEPS:
        return (step + 1) / WARM_STEPS
    done = (step - WARM_STEPS) / max(steps - WARM_STEPS, 1)
    return LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    # its configuration and tokenizer; the weights are made anew
    write_tiny_model(
        args.out,
        arch="qwen3-moe",
        hidden=args.hidden,
        layers=args.layers,
        experts=args.experts,
        experts_per_token=args.experts_per_token,
        context=args.window,
    )
    config = transformers.AutoConfig.from_pretrained(args.out)
    config.router_aux_loss_coef = BALANCE
    # the default goes from expert to expert, ten times slower on a CPU
    model = transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm").to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, args.steps))
    tokens = byte_ids(args.out)
    texts = [tokens[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()] for text in training_texts()]
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        ids = batch_of(texts, args.batch, args.window, rng).to(args.device)
        found = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % SHOW_EVERY == 0 or step == args.steps:
            print(f"step {step}: loss {found.loss:.3f} nats a byte, {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(args.out)


def byte_ids(folder: Path) -> torch.Tensor:
    """[256], int64: the token of each byte; ids are in the order of a byte-level alphabet."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    written = bytes_to_unicode()
    return torch.tensor(tokenizer.convert_tokens_to_ids([written[byte] for byte in range(256)]))


if __name__ == "__main__":
    main()
