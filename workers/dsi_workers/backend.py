"""What a model library must offer so that ModelEngine can run it: logits for runs of positions.

A backend knows nothing of requests, sampling or drafts: `engines/model.py` does that on top of any backend.
`decoding/torch_backend.py` is our own backend. docs/extending.md shows how to add another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsi_protocol import SamplingParameters
from dsi_workers.engine import Interrupt, Never

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Run:
    """Successive tokens of one generation: the inputs at positions [begin, begin + len(tokens))."""

    #: Which part of the KV cache holds the generation.
    slot: int
    tokens: Sequence[int]
    begin: int
    #: Rows to compute for this run; those beyond `tokens` are padding. 0: the backend chooses.
    width: int
    #: Logits are wanted after each input from this position on.
    first_logits: int
    #: The run lies on a branch that leaves the slot's own path at this position; None: the run lies on the slot's own path. The
    #: runs of one branch stand one after another, from `fork` on, behind the run of the slot's own path.
    fork: int | None = None

    @property
    def wanted(self) -> range:
        """The positions after whose inputs logits are wanted."""
        end = self.begin + len(self.tokens)
        return range(min(max(self.first_logits, self.begin), end), end)


class Backend(Protocol):
    """A loaded and warm model. All calls come from one thread. A class that inherits from this one must only add the attributes
    and `compute`.

    A target's backend must keep one promise. Beyond the prompt, the logits after a position have the same bits for the same
    tokens before it, whatever the other runs are and however the tokens were grouped into runs. The runs of a prompt name
    their `width`, which depends on the prompt alone: the bits may depend on that width.

    A drafter's backend makes no promise: wrong drafts cost time, and never change the text.
    """

    #: Hash of the vocabulary (dsi_protocol.vocabulary_hash).
    vocabulary: str
    #: Logits of one position.
    vocabulary_size: int
    #: Most positions of one generation, prompt included.
    max_length: int
    #: Generations whose keys and values are held side by side. Runs name them 0 to slots - 1.
    slots: int
    #: Most positions of one run beyond the prompt: a longer verification takes several forwards.
    window: int
    #: A target reads a prompt in chunks of this many positions, aligned to position 0. So the bits of a prompt's keys and values
    #: depend on the prompt alone, and not on how many of its tokens came with which request.
    prompt_chunk: int = 128
    #: Most rows of a `compute` for several generations. A generation by itself may take more.
    most_rows: int
    #: Most tokens of a tree that a target verifies (Verify in SPEC.md). A branch of so many tokens must fit into `most_rows`.
    #: 1: the backend computes chains only, and no run has a `fork`.
    tree_rows: int = 1
    #: Further slots, numbered from `slots` on, in which a drafter continues branches. 0: it drafts chains only.
    branch_slots: int = 0
    #: Devices that compute one forward together. With another number of devices the logits have other bits.
    devices: int = 1
    #: Of a drafter: the most tokens that `draft` gives in one call. 1: there is no `draft`.
    most_drafts: int = 1
    #: The library's build and its settings, as far as bits depend on them. Part of a target's fingerprint.
    build: str = ""
    #: Calls of the model so far. ModelEngine sets it to 0 when it is built.
    forwards: int

    def compute(self, runs: Sequence[Run], interrupt: Interrupt) -> list[torch.Tensor]:
        """Do one forward, store the keys and values of each run, and return the logits of each run.

        The logits of a run are [len(run.wanted), vocabulary_size]. Positions before `run.begin` were computed by earlier runs
        of the same slot. What the slot holds from `run.begin` on is out of date and must not be read.

        A run with a `fork` reads what the slot holds before `fork`, runs of this forward included, and from there on the runs of
        its own branch. Its keys and values are not kept: after the forward the slot holds what it would hold without the branch.

        Call `interrupt.check()` now and then, such as between layers: it raises Interrupted when nobody wants the logits any
        more. After that no run counts as computed, so that `compute` may stop anywhere.

        Runs of the fingerprint and of `time_s` lie at positions [0, prompt_chunk + window), even where `max_length` is less.
        """

    def copy(self, source: int, destination: int, begin: int, end: int) -> None:
        """Copy the keys and values of the positions [begin, end) from one slot to another. Needed with `branch_slots` only."""
        if self.branch_slots:
            raise NotImplementedError("a backend with branch_slots must copy keys and values from one slot to another")

    def draft(
        self,
        runs: Sequence[Run],
        parameters: Sequence[SamplingParameters],
        *,
        count: int,
        words: int,
        interrupt: Interrupt,
    ) -> list[list[int]] | None:
        """Continue each run, which has one token, by `count` tokens below `words`, chosen by its parameters (SPEC.md section 7).

        Faster than as many calls of `compute`. Each token is the input of the next, so the slot then holds the keys and values of
        all but the last. `interrupt` as in `compute`. None: with these parameters only `compute` can be used.
        """
        return None

    def rows(self, run: Run) -> int:
        """How many of `most_rows` the run takes in a forward for several generations."""
        return max(run.width, len(run.tokens))

    def time_s(self, runs: Sequence[Run]) -> float:
        """Do `compute` for these runs and return the seconds until the device has finished.

        Positions before the runs may never have been computed: only the time is of interest. Override this where `compute`
        returns before the device has finished.
        """
        begun = time.perf_counter()
        self.compute(runs, Never())
        return time.perf_counter() - begun

    def release(self) -> None:
        """Free what only fingerprint and calibration have used of slot 0."""
        return None

    def close(self) -> None:
        """End what computes beside this process. No other call comes afterwards."""
        return None
