"""What a decoder asks of the other ranks of its group, each of which has a part of every layer's weights.

A rank is a process with a device of its own. Heads, the inner columns of the MLP and the rows of the vocabulary are divided
among ranks, so that a layer needs two sums over ranks: after attention and after the MLP.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from dsi_workers.decoding.share import Share


class Ranks(Protocol):
    """The ranks of a group, as one of them sees them. All ranks make the same calls in the same order."""

    share: Share

    def embed(self, ids: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The embeddings [rows, hidden] of these ids [rows]. `embedding`: this rank's rows of the matrix."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, which have one shape: rank 0 first, then rank 1, and so on. So the bits of a row do
        not depend on the number of rows, and are the same at all ranks."""

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        """At rank 0 the logits of all tokens [rows, vocabulary], from this rank's [rows, its part of the vocabulary]. The other
        ranks get theirs back."""


class Alone:
    """A process that has all of the weights."""

    share = Share()

    def embed(self, ids: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, embedding)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        return logits
