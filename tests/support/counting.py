"""Test support: what a piece of work costs, counted and not timed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, SupportsIndex


class CountedList(list[Any]):
    """A list that counts its elements as they are copied, iterated over, compared or searched: each in `touched`.

    C code that knows a list when it sees one, such as `len` and `append`, does not count.
    """

    touched = 0

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        found = super().__getitem__(place)
        self.touched += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Iterator[Any]:
        for element in super().__iter__():
            self.touched += 1
            yield element

    def __reversed__(self) -> Iterator[Any]:
        for element in super().__reversed__():
            self.touched += 1
            yield element

    def __contains__(self, element: object) -> bool:
        self.touched += len(self)
        return super().__contains__(element)

    def __eq__(self, other: object) -> bool:
        self.touched += len(self)
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self.touched += len(self)
        return super().__ne__(other)

    __hash__ = None

    def copy(self) -> list[Any]:
        self.touched += len(self)
        return super().copy()

    def index(self, *arguments: Any) -> int:
        found = super().index(*arguments)
        self.touched += found + 1 - (arguments[1] if len(arguments) > 1 else 0)
        return found


def calls_of(work: Callable[[], object]) -> int:
    """Calls of functions, of Python's own too, while `work` runs: loops over a text call something for each token."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what others do when garbage is collected does not count
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls
