"""What a worker on another machine needs of the models that Welcome names, made ready before they are loaded.

That may take an hour. It happens in a process of its own (preparation.py); meanwhile this one tells the orchestrator with
Preparing that it is no loader that hangs, and hears if nobody needs it any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsi_protocol import Goodbye, Preparing, Welcome
from dsi_workers.connection import WorkSocket
from dsi_workers.models.files import ModelError, Report

_LOOK_S = 0.1
#: Between two Preparings.
_TELL_EVERY_S = 1.0


class NotNeeded(Exception):
    """Nobody needs what this worker fetches. `farewell` is the orchestrator's word, if it said one."""

    def __init__(self, farewell: Goodbye | None = None) -> None:
        super().__init__()
        self.farewell = farewell


def with_own_models(
    welcome: Welcome, device: str, socket: WorkSocket, still_needed: Callable[[], bool], report: Report
) -> Welcome:
    """The same Welcome with directories of this machine in place of model references. Raises ModelError, NotNeeded, and
    EngineError if there is no such device, which is better known before an hour's fetch."""
    if welcome.engine != "transformers":
        return welcome
    from dsi_workers.engines import check_installed

    check_installed(welcome.engine)
    from dsi_workers.decoding.device import torch_device

    torch_device(device)
    preparing = _Preparing(socket, still_needed, report)
    model = preparing.directory_of(welcome.model, tokenizer_only=False)
    options = dict(welcome.options)
    if welcome.role == "drafter" and options.get("target"):
        with contextlib.suppress(ModelError):  # then engines/translating.py says what follows
            options["target"] = preparing.directory_of(str(options["target"]), tokenizer_only=True)
    return dataclasses.replace(welcome, model=model, options=options)


class _Preparing:
    def __init__(self, socket: WorkSocket, still_needed: Callable[[], bool], report: Report) -> None:
        self._socket, self._still_needed, self._report = socket, still_needed, report
        self._told_s = 0.0

    def directory_of(self, reference: str, *, tokenizer_only: bool) -> str:
        if Path(reference).is_dir():
            return reference
        words = ["--tokenizer-only"] if tokenizer_only else []
        with subprocess.Popen(
            [sys.executable, "-m", "dsi_workers.models.preparation", *words, "--", reference],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            said = _Said(process)
            try:
                while said.is_alive():
                    self._tell(said.last)
                    self._look()
            finally:
                process.kill()  # it has ended, or nobody wants it: what it fetched so far is kept
        if "directory" in said.last:
            return str(said.last["directory"])
        problem = said.last.get("error") or f"the process that prepares {reference!r} ended with {process.returncode}"
        raise ModelError(str(problem))

    def _tell(self, said: Mapping[str, Any]) -> None:
        if "what" not in said:
            return
        what, done, detail = str(said["what"]), said["done"], str(said["detail"])
        self._report(what, done, detail)
        if time.monotonic() - self._told_s > _TELL_EVERY_S:
            self._told_s = time.monotonic()
            self._socket.offer(Preparing(what, round(1000 * (done or 0.0))))

    def _look(self) -> None:
        """Raises NotNeeded."""
        message = self._socket.receive(_LOOK_S)
        if isinstance(message, Goodbye):
            raise NotNeeded(message)
        if not self._still_needed():
            raise NotNeeded


class _Said(threading.Thread):
    """The last that the process said. Ends with it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(name="preparation", daemon=True)
        self.last: dict[str, Any] = {}
        assert process.stdout is not None
        self._lines = process.stdout
        self.start()

    def run(self) -> None:
        for line in self._lines:
            self.last = json.loads(line)
