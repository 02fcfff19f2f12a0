"""Which workers can serve beside one another: all speak in the tokens of the target, and target servers compute the same bits."""

from __future__ import annotations

from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Ready


class Compatibility:
    """`memory_s`: a generation may wait so long for a target server. It must not go on with different bits than it began with,
    so those of servers that left count for as long."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        #: Of the first target server.
        self._vocabulary: Ready | None = None
        #: Workers of the fingerprint that counts, and when the last of them left.
        self._fingerprint, self._devices = 0, 1
        self._with_it: set[int] = set()
        self._left_s = 0.0

    @property
    def known(self) -> bool:
        """Whether there was a target server, with which others are compared."""
        return self._vocabulary is not None

    def target_is(self, ready: Ready) -> None:
        self._vocabulary = ready

    def why_not(self, worker: WorkerHandle, ready: Ready, now_s: float) -> str | None:
        """Why this worker cannot serve beside those that do. None: it can, and is counted among them."""
        first = self._vocabulary
        assert first is not None
        if ready.vocabulary not in (first.vocabulary, ""):
            return (
                f"the {worker.role}'s vocabulary ({ready.vocabulary_size} tokens) is not the target's "
                f"({first.vocabulary_size} tokens): choose a model of the same family, or let a drafter's worker read the "
                "target's tokenizer"
            )
        if worker.role != "target" or not ready.fingerprint:
            return None
        if not self._with_it and now_s - self._left_s > self._memory_s:
            self._fingerprint = 0
        if self._fingerprint not in (0, ready.fingerprint):
            if ready.devices != self._devices:
                return (
                    f"it computes on {_devices(ready.devices)}, and the target servers here on {_devices(self._devices)}: their "
                    "sums have another order, so that a text would depend on who answers: give each server as many devices"
                )
            return (
                "its logits have different bits than those of the target servers here, so that a text would depend on who "
                "answers: give all of them the same weights, dtype, threads, kind of device and version of torch"
            )
        self._fingerprint, self._devices = ready.fingerprint, ready.devices
        self._with_it.add(worker.number)
        return None

    def left(self, worker: WorkerHandle, now_s: float) -> None:
        if worker.number in self._with_it:
            self._with_it.remove(worker.number)
            self._left_s = now_s


def _devices(number: int) -> str:
    return "1 device" if number == 1 else f"{number} devices together"
