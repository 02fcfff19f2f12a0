"""A rank beside rank 0, `python -m dsi_workers.group.follower PARENT PIPE MEMORY`: loads its part and does what rank 0 says.

It ends when rank 0 ends, however that happens, and also while it computes or waits for another rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog

from dsi_workers.engine import EngineError, Interrupted
from dsi_workers.group.commands import Pass, Setup, receive, send
from dsi_workers.group.steps import Following, SharedSteps
from dsi_workers.models.files import ModelError

#: How often a rank says that it is alive.
BEAT_S = 0.1
_PR_SET_PDEATHSIG = 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all ranks: rank 0 decides
    parent, pipe_number, memory_number = (int(word) for word in sys.argv[1:])
    _end_with(parent)
    pipe = Connection(pipe_number)
    threading.Thread(target=_end_when_alone, args=[pipe_number], daemon=True).start()
    structlog.configure(  # what there is to say about a start, rank 0 says
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    setup = Setup(*receive(pipe))
    steps = SharedSteps(memory_number, setup.degree)
    threading.Thread(target=_beat, args=[steps, setup.rank], daemon=True).start()
    try:
        forward = _load(setup, pipe)
    except Exception as error:  # rank 0 tells it the orchestrator
        reason = str(error) if isinstance(error, EngineError | ModelError) else f"{type(error).__name__}: {error}"
        send(pipe, f"rank {setup.rank} of the group, on {setup.device}: {reason}")
        return 1
    _serve(forward, steps, pipe)
    return 0


def _end_with(parent: int) -> None:
    """Have the system end this process with its parent, even while this process is stopped. Where the system cannot, the pipe
    tells a process that runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _end_when_alone(pipe: int) -> None:
    """End the process when the pipe closes, whatever its main thread does."""
    watched = select.poll()
    watched.register(pipe, 0)  # a hang-up is reported unasked
    while not watched.poll():
        pass
    os._exit(0)


def _beat(steps: SharedSteps, rank: int) -> None:
    wait = threading.Event().wait
    while True:
        steps.beat(rank)
        wait(BEAT_S)


def _load(setup: Setup, pipe: Connection) -> Any:
    """The rank's Forward. Tells rank 0 when it is loaded, and then meets the other ranks."""
    # Importing torch takes seconds: first come the threads that look after this process.
    from dsi_workers.decoding.device import keep_freed_memory, torch_device
    from dsi_workers.decoding.forward import Forward
    from dsi_workers.decoding.share import Share
    from dsi_workers.group.collectives import Collectives
    from dsi_workers.group.loading import capacity, load_part, meet

    device = torch_device(setup.device)
    ranks = Collectives(Share(setup.rank, setup.degree), device)
    loaded = load_part(setup, ranks)
    keep_freed_memory()
    forward = Forward(loaded.decoder, loaded.config, device, slots=setup.slots, capacity=capacity(loaded))
    send(pipe, "")
    meet(ranks, Path(setup.store), loaded)
    return forward


def _serve(forward: Any, steps: SharedSteps, pipe: Connection) -> None:
    """Do what rank 0 says until it is gone."""
    import torch

    with torch.inference_mode():
        while True:
            try:
                command, *arguments = receive(pipe)
            except (EOFError, OSError):
                return
            if command == "forward":
                todo = Pass.unpacked(arguments)
                forward.interrupt = Following(steps, todo.number)
                forward.read_step, forward.attends_per_position = todo.read_step, todo.attends_per_position
                with contextlib.suppress(Interrupted):
                    forward(todo.runs, rows=todo.rows, logit_rows=todo.logit_rows)
            elif command == "agree":  # each rank has products of its own shapes
                check, rows, window, forward.read_step, forward.attends_per_position = arguments
                send(pipe, getattr(forward, check)(rows, window))
            else:
                getattr(forward.cache, command)(*arguments)


if __name__ == "__main__":
    sys.exit(main())
