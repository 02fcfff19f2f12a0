"""Frames that nobody means well: `make fuzz`, or `python -m fuzzing.codec --frames 1000000`.

With `atheris` installed, --coverage lets it guide the mutation. Each frame is a mutated vector, a message with a field or two
changed, a tree of msgpack objects, or noise. `decode` must return a message or raise a ProtocolError, and must not take more
memory than the frame deserves. What breaks that is printed as hex: put it among protocol/vectors.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgpack

import dsi_protocol
from dsi_protocol import MAX_FRAME_BYTES, ProtocolError, decode, encode

VECTORS = Path(dsi_protocol.__file__).parent.parent / "vectors"
#: A decoded token takes about 8 bytes for each of its 4, and a little for all the rest.
_MEMORY_FACTOR, _MEMORY_SLACK_BYTES = 40, 1 << 18


def seeds() -> list[bytes]:
    """Every frame among the vectors."""
    names = ("messages.json", "tolerated.json", "must_reject.json")
    found = [case for name in names for case in json.loads((VECTORS / name).read_text(encoding="utf-8"))["cases"]]
    return [bytes.fromhex(case["wire"]) for case in found]


def frames(draw: random.Random) -> bytes:
    """One frame."""
    kind = draw.random()
    if kind < 0.3:
        return mutated(draw, draw.choice(_SEEDS))
    if kind < 0.7:
        nearly: bytes = msgpack.packb(nearly_valid(draw), use_bin_type=True)
        return nearly if draw.random() < 0.8 else mutated(draw, nearly)
    if kind < 0.9:
        packed: bytes = msgpack.packb(message_like(draw), use_bin_type=True)
        return packed if draw.random() < 0.7 else mutated(draw, packed)
    return draw.randbytes(draw.randrange(200))


def mutated(draw: random.Random, frame: bytes) -> bytes:
    content = bytearray(frame)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        match draw.randrange(6):
            case 0 if content:
                content[at % len(content)] = draw.choice(
                    (0, 0x7F, 0x80, 0xC1, 0xC6, 0xDD, 0xDF, 0xFF, draw.randrange(256))
                )
            case 1:
                content[at:at] = draw.randbytes(draw.randint(1, 8))
            case 2:
                del content[at : at + draw.randint(1, 8)]
            case 3:
                other = draw.choice(_SEEDS)
                content[at:] = other[draw.randrange(len(other) + 1) :]
            case 4:
                content[at:at] = struct.pack(">BI", draw.choice((0xC6, 0xC9, 0xDB, 0xDD, 0xDF)), draw.getrandbits(32))
            case _:
                content[at:at] = bytes([draw.choice((0x91, 0x81, 0xA1))]) * draw.choice((5, 60, 1100))
    return bytes(content)


def nearly_valid(draw: random.Random) -> dict[object, object]:
    """A message of the vectors with a field or two changed, removed or added."""
    message: dict[object, object] = dict(draw.choice(_WIRE))
    for _ in range(draw.randrange(3)):
        name = draw.choice(list(message))
        match draw.randrange(4):
            case 0:
                message[name] = value(draw, 0)
            case 1:
                message[name] = draw.choice(_WIRE).get(name, 0)
            case 2:
                message.pop(name)
            case _:
                message[draw.choice(("more", "", "x" * 300))] = value(draw, 0)
        if not message:
            break
    return message


def message_like(draw: random.Random) -> dict[object, object]:
    names = (
        "generation", "attempt", "start", "tokens", "base", "base_crc", "count", "block", "done", "busy_us", "logprobs",
        "forwards", "held", "code", "message", "reason", "version", "role", "options", "incarnation", "sequence",
    )  # fmt: skip
    message: dict[object, object] = {"type": draw.choice([*range(-1, 20), True, 3.0, None, "7"])}
    for _ in range(draw.randrange(12)):
        message[draw.choice(names)] = value(draw, 0)
    return message


def value(draw: random.Random, depth: int) -> object:
    kinds: list[Callable[[], object]] = [
        lambda: draw.getrandbits(draw.choice((1, 8, 32, 33, 64))), lambda: -draw.getrandbits(63), lambda: draw.random(),
        lambda: float("nan"), lambda: float("inf"), lambda: None, lambda: draw.random() < 0.5,
        lambda: draw.randbytes(draw.choice((0, 3, 4, 64, 4096))), lambda: "x" * draw.choice((0, 5, 4096, 4097)),
        lambda: "\udcff".encode("utf-8", "surrogatepass"), lambda: msgpack.ExtType(draw.randrange(128), b"abcd"),
    ]  # fmt: skip
    if depth < 12:
        kinds += [
            lambda: [value(draw, depth + 1) for _ in range(draw.randrange(4))],
            lambda: {f"k{key}": value(draw, depth + 1) for key in range(draw.randrange(4))},
        ]
    return draw.choice(kinds)()


_SEEDS = seeds()
_WIRE: list[dict[object, object]] = [
    msgpack.unpackb(bytes.fromhex(case["wire"]))
    for case in json.loads((VECTORS / "messages.json").read_text(encoding="utf-8"))["cases"]
]


def check(frame: bytes) -> str:
    """What became of the frame. Raises what must not happen."""
    try:
        message = decode(frame)
    except ProtocolError as error:
        str(error)
        return type(error).__name__
    assert decode(encode(message)) == message, "what was understood can be said again"
    return "understood"


def check_memory(frame: bytes) -> None:
    tracemalloc.start()
    try:
        check(frame)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= _MEMORY_FACTOR * len(frame) + _MEMORY_SLACK_BYTES, f"{len(frame)} bytes took {peak_bytes}"


def run(number: int, seed: int) -> Counter[str]:
    """Raises AssertionError with the frame in hex."""
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for index in range(number):
        frame = frames(draw)
        try:
            outcomes[check(frame)] += 1
            if index % 100 == 0:
                check_memory(frame)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} for the frame {frame.hex()}") from error
    return outcomes


def big_frames() -> list[bytes]:
    """As much as a frame may promise or hold."""
    return [
        b"\x81\xa4type" + b"\xc6" + struct.pack(">I", MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES - 11),
        b"\x81\xa4type" + b"\xdd" + struct.pack(">I", 1 << 20) + b"\x01" * (1 << 20),
        b"\x81\xa4type" + b"\x91" * (1 << 20),
        b"\x81\xa4type" + b"\xdf" + struct.pack(">I", 1 << 18) + b"\xa0\x01" * (1 << 18),
        b"\xc6" + struct.pack(">I", 1 << 31),
        bytes(MAX_FRAME_BYTES + 1),
        b"\x81\xa4type\xcf" + b"\xff" * 8,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="let atheris guide the mutation (--frames runs)")
    arguments = parser.parse_args()
    for frame in big_frames():
        check_memory(frame)
    if arguments.coverage:
        return _guided(arguments.frames)
    begun = time.monotonic()
    outcomes = run(arguments.frames, arguments.seed)
    took_s = time.monotonic() - begun
    sys.stdout.write(f"{sum(outcomes.values())} frames in {took_s:.0f} s, no crash: {dict(outcomes.most_common())}\n")
    return 0


def _guided(runs: int) -> int:
    import atheris  # not a dependency: it has no build for every Python

    atheris.instrument_all()
    corpus = Path(tempfile.mkdtemp(prefix="dsi-fuzz-"))
    for index, frame in enumerate(_SEEDS):
        (corpus / f"vector-{index}").write_bytes(frame)
    atheris.Setup(
        [sys.argv[0], f"-runs={runs}", "-max_len=4096", str(corpus)], lambda data: check(bytes(data)) and None
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
