"""The backend on torch, with this project's own decoder or transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dsi_protocol import SamplingParameters
from dsi_protocol.sampling import GREEDY
from dsi_workers.backend import Run
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.widths import Widths
from dsi_workers.engine import Interrupt, Never

#: What a token is chosen by has kernels of its own: greedy, sampled, and sampled from a part of the vocabulary.
_EACH_CHOICE = (GREEDY, SamplingParameters(temperature=1.0), SamplingParameters(temperature=1.0, top_p=0.9))


class TorchBackend:
    """Computes logits with torch, and pads the runs of a target to widths whose bits agree.

    `widths` names these widths (widths.py). It is None for a drafter, whose bits do not matter: its runs are not padded.
    `branch_slots`: how many slots of the cache are for branches (backend.py).
    """

    def __init__(
        self,
        forward: Forward,
        widths: Widths | None,
        *,
        vocabulary: str,
        vocabulary_size: int,
        max_length: int,
        window: int,
        branch_slots: int = 0,
        tokenizer: Path | None = None,
    ) -> None:
        #: The model's tokenizer.json.
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.window = window
        self.prompt_chunk = forward.prompt_chunk
        self.slots = forward.cache.slots - branch_slots
        self.branch_slots = branch_slots
        self.devices = forward.devices
        self.build = ""
        self.tree_rows = 1
        self.most_drafts = forward.most_drafts if widths is None else 1
        self.forward = forward
        self.widths = widths
        recorded = max(forward.recorded_rows, default=1 << 30)
        self.most_rows = recorded if widths is None else min(recorded, widths.most)
        if widths is not None:  # A branch is computed by windows of one forward.
            self.tree_rows = max(1, self.most_rows // self.rows(Run(0, [0] * window, 0, window, 0)) * window)

    @property
    def forwards(self) -> int:
        return self.forward.count

    @forwards.setter
    def forwards(self, count: int) -> None:
        self.forward.count = count

    def compute(self, runs: Sequence[Run], interrupt: Interrupt) -> list[torch.Tensor]:
        self.forward.interrupt = interrupt
        runs, rows, logit_rows = self._plan_rows(runs)
        return self.forward(runs, rows=rows, logit_rows=logit_rows)

    def draft(
        self,
        runs: Sequence[Run],
        parameters: Sequence[SamplingParameters],
        *,
        count: int,
        words: int,
        interrupt: Interrupt,
    ) -> list[list[int]] | None:
        self.forward.interrupt = interrupt
        return self.forward.draft([replace(run, width=1) for run in runs], parameters, count=count, words=words)

    def time_s(self, runs: Sequence[Run]) -> float:
        self.forward.interrupt = Never()
        runs, rows, logit_rows = self._plan_rows(runs)
        return self.forward.timed_s(runs, rows=rows, logit_rows=logit_rows)

    def copy(self, source: int, destination: int, begin: int, end: int) -> None:
        with torch.inference_mode():
            self.forward.cache.copy(source, destination, begin, end)

    def rows(self, run: Run) -> int:
        return self._with_width(run, alone=False).width

    def warm_up(self) -> None:
        """Record the graphs of the forwards that are recorded on a GPU."""
        chunk = self.prompt_chunk
        run = Run(0, [0], chunk, 1, chunk)
        for rows in self.forward.recorded_rows:
            self.forward([run] * rows, rows=rows, logit_rows=rows)
        if self.most_drafts > 1:
            for parameters in _EACH_CHOICE:
                self.forward.draft([run], [parameters], count=1, words=self.vocabulary_size)

    def release(self) -> None:
        self.forward.cache.release(0)

    def close(self) -> None:
        self.forward.close()

    def _plan_rows(self, runs: Sequence[Run]) -> tuple[Sequence[Run], int, int]:
        """Return the runs with their widths, the rows of the forward pass, and the number of rows to compute logits for."""
        alone, widths = len(runs) == 1, self.widths
        runs = [self._with_width(run, alone=alone) for run in runs]
        rows, logit_rows = sum(run.width for run in runs), sum(len(run.wanted) for run in runs)
        if widths is None:
            return runs, rows, logit_rows
        if not alone and rows <= widths.most:  # a prompt chunk may be wider: it has a forward pass of its own
            rows = widths.cheapest(rows)
        return runs, rows, widths.cheapest(logit_rows) if logit_rows <= widths.most else logit_rows

    def _with_width(self, run: Run, *, alone: bool) -> Run:
        """Return the run with a width. `alone`: no other run is in the forward pass."""
        if run.width:
            return run
        length = len(run.tokens)
        if self.widths is None:
            return replace(run, width=length)
        return replace(run, width=self.widths.cheapest(length, self.window) if alone else self.widths.narrowest(length))
