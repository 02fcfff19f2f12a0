"""How many positions a chunk of a prompt has, and how many a slot of the KV cache has room for. Needs no torch.

A target reads a prompt in chunks, aligned to position 0. A long chunk uses the device better: each weight is read once for all of
its positions. A short chunk lets other generations in sooner, and more of a kept prefix can be used again, because only whole
chunks are.

On a CPU 128 positions already keep the arithmetic busy. On a GPU the time of a chunk is the larger of two times: reading all
weights, and computing 2 floating-point operations for each weight and position. In bfloat16 (2 bytes) both are equal at as many
positions as the device computes operations in the time in which it reads a byte: 295 on an H100 (989 TFLOP/s, 3.35 TB/s), 206 on
an H200 (4.8 TB/s), 153 on an A100 (312 TFLOP/s, 2.04 TB/s). So 512 positions hide the reading on all three. At 1,024 the products
would be a little faster, because they fill more processors, but others would wait twice as long: about 30 instead of 15 ms for an
8B shape on an H100.
"""

from __future__ import annotations

CPU_PROMPT_CHUNK, GPU_PROMPT_CHUNK = 128, 512
#: A GPU computes a run of more rows, alone in a forward pass, by library calls, as a chunk of a prompt. So no window is longer.
MOST_RUN_ROWS = 64
#: A GPU computes chunks that are not full in multiples of this many rows: a tile of a matrix product has as many anyway.
ROW_TILE = 128
#: A forward pass reads the cache up to a multiple of this many positions, if that keeps the bits. A pass then reads little
#: more than it needs, and its attention has few different shapes.
READ_STEP = 512


def prompt_chunk_of(device_type: str) -> int:
    """Positions of a prompt's chunk on a device of this type, "cpu" or "cuda"."""
    return GPU_PROMPT_CHUNK if device_type == "cuda" else CPU_PROMPT_CHUNK


def slot_positions(max_length: int, prompt_chunk: int) -> int:
    """How many positions a slot has room for.

    Rows that are padding are stored behind a generation: a window, or a chunk that is not full, reaches at most ROW_TILE
    positions beyond `max_length`. The fingerprint and calibration need a chunk and a window, even where `max_length` is less.
    """
    return round_up(max(max_length, prompt_chunk) + ROW_TILE, READ_STEP)


def full_lengths(limit: int) -> range:
    """The values of `max_length` below `limit` that use a slot of each size to the full, but for the room for padding."""
    return range(READ_STEP - ROW_TILE, limit, READ_STEP)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step
