"""What rank 0 tells the other ranks, as msgpack in a pipe: each command is a list of its name and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from dsi_protocol import OptionValue
from dsi_workers.backend import Run


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank loads: its part of which model, on which device. As for load_model."""

    device: str
    threads: int
    directory: str
    reference: str
    dtype: str
    quantization: str
    rows: int
    most_positions: int
    kernels: bool
    exact: bool
    layers: OptionValue | None
    prompt_threads: int
    #: Slots of the KV cache, those of branches included.
    slots: int
    rank: int = 0
    degree: int = 1
    #: The file by which the ranks find one another (collectives.py).
    store: str = ""

    def packed(self) -> list[Any]:
        return list(astuple(self))


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward. The fields are those of Forward."""

    number: int
    read_step: int
    attends_per_position: bool
    runs: Sequence[Run]
    rows: int
    logit_rows: int

    def packed(self) -> list[Any]:
        runs = [[run.slot, list(run.tokens), run.begin, run.width, run.first_logits, run.fork] for run in self.runs]
        return [self.number, self.read_step, self.attends_per_position, runs, self.rows, self.logit_rows]

    @classmethod
    def unpacked(cls, fields: Sequence[Any]) -> Pass:
        number, read_step, attends_per_position, runs, rows, logit_rows = fields
        return cls(number, read_step, attends_per_position, [Run(*run) for run in runs], rows, logit_rows)


def send(pipe: Connection, *words: Any) -> None:
    """Raises OSError if the other side is gone."""
    pipe.send_bytes(msgpack.packb(words))


def receive(pipe: Connection) -> list[Any]:
    """Wait for the next command or answer. Raises EOFError or OSError if the other side is gone."""
    words: list[Any] = msgpack.unpackb(pipe.recv_bytes())
    return words
