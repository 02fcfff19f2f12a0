"""What ranks compute together: sums in the order of ranks, and logits joined at rank 0.

The tensors travel by gloo between CPUs and by NCCL between GPUs. Both only carry them: each rank adds up by itself, rank 0 first.
A library's own sum may have another order for another number of rows, and a token would then have other bits in another batch.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from dsi_workers.decoding.share import Share

#: A rank that takes longer for one part of a forward is taken to hang, and the group ends.
HANGS_AFTER_S = 60.0


class Collectives:
    """The ranks of a group, as one of them sees them (decoding/ranks.py). `connect` comes before the first call."""

    def __init__(self, share: Share, device: torch.device) -> None:
        self.share = share
        self._device = device
        self._group: Any = None
        #: The parts of the vocabulary by rank, once they are known.
        self._words: list[range] = []

    def connect(self, store: Path, words: list[range]) -> None:
        """Wait until all ranks call this. `store`: a file in a private directory, by which they find one another. `words`: the
        part of the vocabulary that each rank has. Raises RuntimeError if a rank does not come."""
        self._words = words
        share = self.share
        meeting = dist.FileStore(str(store), share.degree)  # type: ignore[attr-defined]  # documented, and in no list of names
        limit = timedelta(seconds=HANGS_AFTER_S)
        meeting.set_timeout(limit)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = dist.ProcessGroupNCCL(meeting, share.rank, share.degree, options)
        else:
            loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            chosen = "GLOO_SOCKET_IFNAME" in os.environ
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0] if loopback else "lo")
            try:
                self._group = dist.ProcessGroupGloo(meeting, share.rank, share.degree, limit)
            finally:
                if not chosen:  # what this process starts later shall not inherit it
                    del os.environ["GLOO_SOCKET_IFNAME"]
        self.sum(torch.zeros(1, device=self._device))  # all are there, and the file has served its purpose

    def embed(self, ids: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        words = self._words[self.share.rank]
        own = (ids >= words.start) & (ids < words.stop)
        found = functional.embedding((ids - words.start).where(own, 0), embedding)
        return self.sum(found.masked_fill(~own[:, None], 0))

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(partial) for _ in range(self.share.degree)]
        self._group.allgather([parts], [partial.contiguous()]).wait()
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(partial.dtype)

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        widest = max(map(len, self._words))
        padded = functional.pad(logits, (0, widest - logits.shape[1])).contiguous()
        options = dist.GatherOptions()
        options.rootRank = 0
        if self.share.rank:
            self._group.gather([], [padded], options).wait()
            return logits
        parts = [torch.empty_like(padded) for _ in self._words]
        self._group.gather([parts], [padded], options).wait()
        return torch.cat([part[:, : len(words)] for part, words in zip(parts, self._words, strict=True)], dim=1)
