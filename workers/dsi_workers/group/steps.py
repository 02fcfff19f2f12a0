"""How the ranks of a group agree on where a forward is stopped: memory that they share.

A forward has parts: one before the first layer, and one for each layer. Ranks meet in collectives within each part, so none may
run a part that another one skips. Rank 0 alone decides. Before it runs a part it raises the number of parts allowed, which is
never taken back; another rank runs a part once it is allowed. When the work is not wanted any more, rank 0 ends the forward
before the next part, and the others end theirs there.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from typing import IO

from dsi_workers.engine import Interrupt, Interrupted

#: Bits of the word that says how far the forward may go: its number, how many parts are allowed, and whether it was ended.
_FORWARD_SHIFT, _PARTS_MASK, _ENDED = 32, (1 << 31) - 1, 1 << 31
#: A rank looks this often before it begins to sleep between looks: rank 0 is seldom later than that.
_LOOKS, _NAP_S = 2000, 5e-5


class SharedSteps:
    """Memory that all ranks of a group map. Its first word says how far the forward may go, and then each rank has a word that
    changes while the rank is alive. A word is read and written as a whole."""

    def __init__(self, file: IO[bytes] | int, degree: int) -> None:
        """`file`: of `create`, or its descriptor in another process."""
        self._file = file
        #: The descriptor by which another process can map the same memory.
        self.number = file if isinstance(file, int) else file.fileno()
        self._words = memoryview(mmap.mmap(self.number, 8 * (1 + degree))).cast("Q")

    @classmethod
    def create(cls, degree: int) -> SharedSteps:
        file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this object
        os.ftruncate(file.fileno(), 8 * (1 + degree))
        return cls(file, degree)

    def close_file(self) -> None:
        """Close the descriptor, once the other processes have it. The memory stays."""
        if not isinstance(self._file, int):
            self._file.close()

    @property
    def word(self) -> int:
        return self._words[0]

    @word.setter
    def word(self, value: int) -> None:
        self._words[0] = value

    def beat(self, rank: int) -> None:
        """Say that the rank is alive."""
        self._words[1 + rank] += 1

    def beats(self, rank: int) -> int:
        return self._words[1 + rank]


@dataclass(slots=True)
class Leading:
    """Rank 0's Interrupt for one forward: lets the others run each part that it runs."""

    steps: SharedSteps
    interrupt: Interrupt
    #: The forward was ended before its last part, by all ranks.
    ended: bool = False

    def begin(self) -> int:
        """Begin a forward, of which no part is allowed yet. Returns its number."""
        number = ((self.steps.word >> _FORWARD_SHIFT) + 1) & 0xFFFFFFFF
        self.steps.word = number << _FORWARD_SHIFT
        return number

    def check(self) -> None:
        try:
            self.interrupt.check()
        except BaseException:
            self.ended = True
            self.steps.word |= _ENDED
            raise
        self.steps.word += 1

    def wait_until(self, deadline_s: float) -> None:
        self.interrupt.wait_until(deadline_s)


@dataclass(slots=True)
class Following:
    """The Interrupt of another rank for forward `number`: waits until rank 0 allows the next part."""

    steps: SharedSteps
    number: int
    parts: int = 0

    def check(self) -> None:
        looks = 0
        while True:
            word = self.steps.word
            if word >> _FORWARD_SHIFT != self.number:
                raise Interrupted
            if word & _PARTS_MASK > self.parts:
                self.parts += 1
                return
            if word & _ENDED:
                raise Interrupted
            looks += 1
            time.sleep(_NAP_S if looks > _LOOKS else 0)  # 0: let another process run

    def wait_until(self, deadline_s: float) -> None:
        time.sleep(max(0.0, deadline_s - time.perf_counter()))
