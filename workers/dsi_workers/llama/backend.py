"""The backend on llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dsi_workers.backend import Backend, Run
from dsi_workers.engine import Interrupt, Never
from dsi_workers.llama.library import Context, Row
from dsi_workers.llama.widths import Agreement


class LlamaBackend(Backend):
    """Computes logits with llama.cpp. A slot is a sequence of its KV cache.

    `agreement` (of a target): the widths whose bits agree, to which runs are padded. The padding lies behind the run, in the same
    sequence, and is removed before the sequence's next run. None for a drafter, whose runs are not padded.
    """

    def __init__(
        self, context: Context, agreement: Agreement | None, *, slots: int, window: int, max_length: int, vocabulary: str,
        vocabulary_size: int, build: str = "",
    ) -> None:  # fmt: skip
        self._context = context
        self._agreement = agreement
        self.slots = slots
        self.window = window
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.vocabulary_size = vocabulary_size
        self.build = build
        self.most_rows = slots * window if agreement is None else agreement.together * window
        self.forwards = 0

    def compute(self, runs: Sequence[Run], interrupt: Interrupt) -> list[torch.Tensor]:
        interrupt.check()
        for run in runs:
            self._context.cut(run.slot, run.begin)
        rows = [row for run in runs for row in self._rows_of(run, self._width(run, runs), alone=len(runs) == 1)]
        self.forwards += 1
        logits = iter(self._context.forward(rows, interrupt))
        found = {(row.sequence, row.position): next(logits) for row in rows if row.wanted}
        return [self._logits_of(run, found) for run in runs]

    def rows(self, run: Run) -> int:
        return len(run.tokens) if self._agreement is None else max(self.window, run.width)

    def time_s(self, runs: Sequence[Run]) -> float:
        for slot, run in enumerate(runs):
            for begin in range(min(run.begin, self._context.length(slot)), run.begin, self.prompt_chunk):
                end = min(begin + self.prompt_chunk, run.begin)
                self._context.forward([Row(0, position, slot, False) for position in range(begin, end)], Never())
        runs = [Run(slot, run.tokens, run.begin, run.width, run.first_logits) for slot, run in enumerate(runs)]
        begun = time.perf_counter()
        self.compute(runs, Never())
        return time.perf_counter() - begun

    def release(self) -> None:
        for slot in range(self.slots):
            self._context.cut(slot, 0)

    def close(self) -> None:
        self._context.close()

    def _width(self, run: Run, runs: Sequence[Run]) -> int:
        """How many rows the run has in a forward for `runs`."""
        if run.width or self._agreement is None:
            return run.width or len(run.tokens)
        if len(runs) == 1:
            return self._agreement.cheapest(len(run.tokens), self.window)
        return self._agreement.together_width(max(len(each.tokens) for each in runs))

    def _rows_of(self, run: Run, width: int, *, alone: bool) -> list[Row]:
        """The run's rows, with padding. Logits are computed after as many rows as the bits need: in the last layer the others
        are left out, so that their number is the width of its products."""
        wanted = len(run.wanted)
        if self._agreement is not None and wanted:
            most = self._agreement.most
            wanted = width if not alone or wanted > most else min(width, self._agreement.narrowest(wanted))
        tokens = [*run.tokens, *[0] * (width - len(run.tokens))]
        first = min(run.wanted.start - run.begin, width - wanted) if wanted else width
        return [Row(token, run.begin + at, run.slot, first <= at < first + wanted) for at, token in enumerate(tokens)]

    def _logits_of(self, run: Run, found: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        rows = [found[run.slot, position] for position in run.wanted]
        return torch.stack(rows) if rows else torch.empty(0, self.vocabulary_size)
