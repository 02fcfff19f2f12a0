"""How what is divided among the ranks of a group is divided. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of everything that is divided belongs to a rank. The parts of all ranks are the whole."""

    rank: int = 0
    #: The number of ranks.
    degree: int = 1

    def of(self, count: int, unit: int = 1) -> range:
        """This rank's part of [0, count), in whole units of `unit`. The first ranks have a unit more if it does not divide
        evenly. `count` is a multiple of `unit`."""
        units, left = divmod(count // unit, self.degree)
        begin = self.rank * units + min(self.rank, left)
        return range(begin * unit, (begin + units + (self.rank < left)) * unit)

    def all(self) -> Sequence[Share]:
        """The shares of all ranks, in their order."""
        return [Share(rank, self.degree) for rank in range(self.degree)]
