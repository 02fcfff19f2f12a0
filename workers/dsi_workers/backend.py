"""What a model engine computes with: logits for runs of positions, and nothing about requests, sampling or drafts.

`engines/model.py` is the engine over a backend. `decoding/torch_backend.py` is our own; another library can be put behind the
same protocol (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsi_workers.engine import Interrupt

if TYPE_CHECKING:
    import torch

#: A target reads a prompt in chunks of this many positions, aligned to position 0. Their bits are a function of the prompt
#: alone, however many of its tokens have arrived.
PROMPT_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Run:
    """Inputs [begin, begin + len(tokens)) of the generation in `slot`."""

    slot: int
    tokens: Sequence[int]
    begin: int
    #: Rows that the run is computed as, padding included. 0: the backend chooses.
    width: int
    #: Logits are wanted after each input from this position on.
    first_logits: int

    @property
    def wanted(self) -> range:
        """The positions after whose inputs logits are wanted."""
        end = self.begin + len(self.tokens)
        return range(min(max(self.first_logits, self.begin), end), end)


class Backend(Protocol):
    """A loaded model. Calls come from one thread.

    For a target the logits after a position must have the same bits whatever the other runs are and however the inputs were
    grouped into runs, from the end of the prompt on. A run of a prompt names its width: there the bits may depend on it.
    """

    #: Hash of the vocabulary (dsi_protocol.vocabulary_hash).
    vocabulary: str
    vocabulary_size: int
    #: Positions of one generation.
    max_length: int
    #: Generations whose keys and values are held side by side.
    slots: int
    #: Positions of one verification.
    window: int
    #: Rows that runs of several generations may have together in one `compute`.
    most_rows: int
    #: Forwards so far.
    forwards: int

    def compute(self, runs: Sequence[Run], interrupt: Interrupt) -> list[torch.Tensor]:
        """One forward. Writes the keys and values of each run and returns its logits, [len(run.wanted), vocabulary_size].

        Positions before `run.begin` were computed by earlier runs of the same slot. Raises Interrupted; then no run counts as
        computed.
        """

    def rows(self, run: Run) -> int:
        """How many of `most_rows` the run takes."""

    def time_s(self, runs: Sequence[Run]) -> float:
        """How long `compute` takes for these runs, in seconds, to the end of the work on the device."""

    def warm_up(self) -> None:
        """Do now what the first forwards would do once: record graphs, compile, allocate."""

    def release(self) -> None:
        """Give back the memory of slot 0, which warm-up and calibration have used."""
