"""A pass of many rows, as of a prompt, in several threads: each thread computes a part of the rows.

Rows are computed one by one, whatever rows are beside them (kernels.py), so parts have the same bits as the whole. Only attention
reads what other rows have stored: in each layer a part waits for the part before it. The first part waits for nothing, and
each of the others is behind the one before by about the time of attention in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from dsi_workers.decoding.capacity import CPU_PROMPT_CHUNK
from dsi_workers.decoding.cpu import ROWS_TOGETHER
from dsi_workers.decoding.packed import PackedBatch, Segment

#: More threads would have nothing to do in a chunk of a prompt.
MOST_THREADS = CPU_PROMPT_CHUNK // ROWS_TOGETHER


class Part(NamedTuple):
    """Some rows of a pass, as a segment of their own."""

    rows: slice
    segment: Segment


#: Computes a part, of this number. In each layer it calls `may_read` before it reads what the parts before it store there, ends
#: at once if that is False, and calls `has_stored` when its own rows are stored.
ComputesPart: TypeAlias = Callable[[int, Callable[[], bool], Callable[[], None]], None]


def parts_of(packed: PackedBatch, most: int) -> Sequence[Part]:
    """At most this number of parts of about the same size, each of at least ROWS_TOGETHER rows where there are so many. An empty
    list if the rows are not one run of positions."""
    if len(packed.segments) != 1 or packed.per_position:
        return []
    (segment,) = packed.segments
    width = segment.width
    if segment.fork is not None or width != len(packed.ids):
        return []
    count = max(1, min(most, width // ROWS_TOGETHER))
    ends = [width * number // count // ROWS_TOGETHER * ROWS_TOGETHER for number in range(count)] + [width]
    return [
        Part(
            slice(begin, end), Segment(segment.slot, segment.position + begin, end - begin, segment.position + end)
        )
        for begin, end in pairwise(ends)
    ]  # fmt: skip


class PartThreads:
    """The threads that compute parts, beside the one that calls `compute`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._pool = ThreadPoolExecutor(max(1, most - 1), thread_name_prefix="part")

    def compute(self, parts: int, compute: ComputesPart, between_layers: Callable[[], None]) -> None:
        """Compute so many parts, the first of them in this thread. An exception of `between_layers` ends all of them."""
        #: For each part and each layer, whether the part may go on.
        signals = [SimpleQueue[bool]() for _ in range(parts + 1)]
        given_up = False

        def first_may_read() -> bool:
            between_layers()
            return True

        def run(number: int) -> None:
            if given_up:
                return
            try:
                compute(
                    number,
                    signals[number].get if number else first_may_read,
                    lambda: signals[number + 1].put(True),
                )
            finally:
                signals[number + 1].put(False)

        others = list[Future[None]]()
        try:
            for number in range(1, parts):
                others.append(self._pool.submit(run, number))
        except RuntimeError:  # no thread can be started: what was submitted must not wait, nor compute later
            given_up = True
            for signal in signals:
                signal.put(False)
            wait(others)
            raise
        try:
            run(0)
        finally:
            errors = [other.exception() for other in others]  # waits for them
        for error in errors:
            if error is not None:
                raise error
