"""How large the Triton launches are: splits, tiles and scratch, from shapes alone.

Apart from the kernels so that a server can count their transients before it has a KV pool, and a machine without Triton
can test that. Invariant: nothing here reads a device value.
"""

from __future__ import annotations

import torch

# programs per multiprocessor that a launch aims at; arbitrary, measure before changing
WAVES = 4
# programs of the verify kernel that are resident on a multiprocessor, small ones aside (`is_small_tile`)
VERIFY_RESIDENT = 2
MAX_SPLITS = 32
# query rows of a tile of the verify kernel
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 16, 64
# scratch that all programs of a selection may hold together
SELECT_SCRATCH_BYTES = 64 << 20


def num_multiprocessors(device: torch.device) -> int:
    """1 where there are none: on a CPU, and under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(num_programs: int, max_kv_len: int, block: int, num_sms: int, per_sm: int = WAVES) -> int:
    """A power of two: enough programs to fill the device, at least two tiles in each."""
    wanted = min(per_sm * num_sms // max(1, num_programs), -(-max_kv_len // (2 * block)), MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def choose_verify_splits(
    num_programs: int, max_kv_len: int, block: int, num_sms: int, resident: int = VERIFY_RESIDENT
) -> int:
    """The same for the verify kernel: one full wave, for the last of several is rarely full (docs/kernels.md).

    At least two splits while WAVES allow them: a wave of whole requests takes as long as the longest.
    """
    one_wave = choose_splits(num_programs, max_kv_len, block, num_sms, resident)
    return max(one_wave, min(2, choose_splits(num_programs, max_kv_len, block, num_sms)))


def block_rows(num_rows: int) -> int:
    """Query rows per tile of the verify kernel: a power of two from MIN_BLOCK_ROWS to MAX_BLOCK_ROWS."""
    return min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, 1 << (num_rows - 1).bit_length()))


def is_small_tile(num_rows: int, head_dim: int) -> bool:
    """Whether a program holds so little that WAVES of them are resident: few query rows, of short heads."""
    return num_rows <= MIN_BLOCK_ROWS and head_dim <= 64


def verify_resident(num_rows: int, head_dim: int) -> int:
    """Programs of the verify kernel on a multiprocessor that its splits aim at, by the query rows of a KV head."""
    return WAVES if is_small_tile(num_rows, head_dim) else VERIFY_RESIDENT


def num_row_tiles(num_rows: int) -> int:
    """Tiles of the `num_rows` query rows that share a KV head; with more than one each has its own scores."""
    return -(-num_rows // block_rows(num_rows))


def num_select_programs(num_rows: int, max_len: int, num_sms: int) -> int:
    """Programs of a selection over `num_rows` score rows; each holds 2 x max_len float32 of scratch."""
    return min(num_rows, WAVES * num_sms, max(1, SELECT_SCRATCH_BYTES // (8 * max(1, max_len))))
