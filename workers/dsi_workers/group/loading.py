"""Loads a model for one process, or divided among the ranks of a group: each rank reads its own part only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from dsi_workers.checkpoints.load import Loaded, load_model
from dsi_workers.checkpoints.slices import words_of
from dsi_workers.decoding.capacity import slot_positions
from dsi_workers.decoding.device import torch_device
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.share import Share
from dsi_workers.engine import EngineError
from dsi_workers.group.collectives import Collectives
from dsi_workers.group.commands import Setup
from dsi_workers.group.followers import Followers
from dsi_workers.group.forward import GroupForward


def load_whole(setup: Setup) -> tuple[Loaded, Forward]:
    """Load the model in this process alone. Raises EngineError and ModelError."""
    loaded = load_part(setup, None)
    device = torch_device(setup.device)
    return loaded, Forward(loaded.decoder, loaded.config, device, slots=setup.slots, capacity=capacity(loaded))


def load_group(devices: Sequence[str], setup: Setup) -> tuple[Loaded, Forward]:
    """Load the model on these devices, of which the first is this process's. `setup`: of rank 0.

    Raises EngineError and ModelError.
    """
    device = torch_device(setup.device)
    with ExitStack() as on_error:
        followers = Followers(devices, setup)
        on_error.callback(followers.close)
        ranks = Collectives(Share(0, len(devices)), device)
        loaded = load_part(setup, ranks)
        followers.await_loaded()
        try:
            meet(ranks, followers.store, loaded)
        except RuntimeError as error:
            raise EngineError(f"the processes of the group do not reach one another: {error}") from None
        followers.end_meeting()
        on_error.pop_all()
    return loaded, GroupForward(
        followers, loaded.decoder, loaded.config, device, slots=setup.slots, capacity=capacity(loaded)
    )


def load_part(setup: Setup, ranks: Collectives | None) -> Loaded:
    """Load a rank's part of the model; None: all of it."""
    torch.set_num_threads(setup.threads)
    return load_model(
        Path(setup.directory), torch_device(setup.device), reference=setup.reference, dtype=setup.dtype,
        quantization=setup.quantization, rows=setup.rows, most_positions=setup.most_positions, kernels=setup.kernels,
        exact=setup.exact, layers=setup.layers, prompt_threads=setup.prompt_threads, ranks=ranks,
    )  # fmt: skip


def meet(ranks: Collectives, store: Path, loaded: Loaded) -> None:
    """Find the other ranks. Raises RuntimeError if one does not come."""
    ranks.connect(store, [words_of(loaded.config, share) for share in ranks.share.all()])


def capacity(loaded: Loaded) -> int:
    """Positions of a slot."""
    return slot_positions(loaded.positions, loaded.decoder.prompt_chunk)
