"""Rank 0's forward passes and KV cache: whatever is done here, the other ranks do, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsi_workers.backend import Run
from dsi_workers.decoding.forward import ComputesLogits, Forward
from dsi_workers.decoding.kv_cache import SlotCache
from dsi_workers.group.commands import Pass
from dsi_workers.group.followers import Followers
from dsi_workers.group.steps import Leading


class GroupForward(Forward):
    """Runs forward passes of a model that is divided among ranks, as rank 0. An interrupt ends a pass at all ranks before the
    same layer."""

    def __init__(
        self,
        followers: Followers,
        decoder: ComputesLogits,
        config: Any,
        device: torch.device,
        *,
        slots: int,
        capacity: int,
    ) -> None:
        super().__init__(decoder, config, device, slots=slots, capacity=capacity)
        self._followers = followers
        self.devices = followers.degree
        self.cache = GroupCache(followers, len(self.cache.layers), slots=slots, capacity=self.cache.capacity)

    def __call__(self, runs: Sequence[Run], *, rows: int, logit_rows: int) -> list[torch.Tensor]:
        interrupt = self.interrupt
        interrupt.check()
        leading = Leading(self._followers.steps, interrupt)
        todo = Pass(leading.begin(), self.read_step, self.attends_per_position, runs, rows, logit_rows)
        self._followers.tell("forward", *todo.packed())
        self.interrupt = leading
        try:
            return super().__call__(runs, rows=rows, logit_rows=logit_rows)
        except Exception as error:
            if not leading.ended:  # other ranks may wait for this one within a part
                self._followers.end_group(f"a forward pass failed: {type(error).__name__}: {error}")
            raise
        finally:
            self.interrupt = interrupt

    def kernels_agree(self, rows: int, window: int) -> bool:
        return self._agree("kernels_agree", super().kernels_agree, rows, window)

    def batches_agree(self, rows: int, window: int) -> bool:
        return self._agree("batches_agree", super().batches_agree, rows, window)

    def _agree(self, name: str, check: Any, rows: int, window: int) -> bool:
        """Whether the check holds at every rank: each has products of its own shapes."""
        self._followers.tell("agree", name, rows, window, self.read_step, self.attends_per_position)
        here = bool(check(rows, window))
        return all([here, *self._followers.answers()])

    @property
    def decoder_kind(self) -> str:
        return f"{super().decoder_kind} of {self.devices} ranks"

    def close(self) -> None:
        self._followers.close()


class GroupCache(SlotCache):
    """The keys and values of rank 0's heads. The other ranks have those of theirs."""

    def __init__(self, followers: Followers, layers: int, *, slots: int, capacity: int) -> None:
        super().__init__(layers, slots=slots, capacity=capacity)
        self._followers = followers

    def copy(self, source: int, destination: int, begin: int, end: int) -> None:
        self._followers.tell("copy", source, destination, begin, end)
        super().copy(source, destination, begin, end)

    def release(self, slot: int) -> None:
        self._followers.tell("release", slot)
        super().release(slot)

    def fill_at_random(self) -> None:
        self._followers.tell("fill_at_random")
        super().fill_at_random()
