"""Fetches or converts the models that Welcome names, on a worker that no supervisor has prepared.

This may take an hour, so it happens in a separate process (models/preparation.py). Meanwhile the worker sends Preparing, so
that the orchestrator does not think that loading hangs. It also notices if it is no longer needed.
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
from dsi_workers.models.files import ModelError, Report, is_ready

#: The interval of checks whether this worker is still needed.
_CHECK_INTERVAL_S = 0.1
#: The interval between two Preparing messages.
_PREPARING_INTERVAL_S = 1.0


class NotNeeded(Exception):
    """This worker is no longer needed. `farewell` is the orchestrator's Goodbye, if it sent one."""

    def __init__(self, farewell: Goodbye | None = None) -> None:
        super().__init__()
        self.farewell = farewell


def with_local_models(
    welcome: Welcome, device: str, socket: WorkSocket, still_needed: Callable[[], bool], report: Report
) -> Welcome:
    """Return the Welcome with directories of this machine in place of model references.

    Raises ModelError and NotNeeded. Raises EngineError if the engine is not installed or the device is missing: the user should
    know this before a fetch of an hour.
    """
    if welcome.engine != "transformers":
        return welcome
    from dsi_workers.engines import check_installed

    check_installed(welcome.engine)
    from dsi_workers.decoding.device import torch_device

    torch_device(device)
    preparing = _Preparing(socket, still_needed, report)
    options = dict(welcome.options)
    adapter = str(options.pop("adapter", ""))  # merged into the directory that the engine is given
    model = preparing.directory_of(welcome.model, adapter=adapter)
    if welcome.role == "drafter" and options.get("target"):
        with contextlib.suppress(ModelError):  # engines/translating.py then drafts without it, and logs a warning
            options["target"] = preparing.directory_of(str(options["target"]), tokenizer_only=True)
    return dataclasses.replace(welcome, model=model, options=options)


class _Preparing:
    """Prepares models in separate processes, and reports their progress."""

    def __init__(self, socket: WorkSocket, still_needed: Callable[[], bool], report: Report) -> None:
        self._socket, self._still_needed, self._report = socket, still_needed, report
        #: When the last Preparing was sent.
        self._sent_s = 0.0

    def directory_of(self, reference: str, *, adapter: str = "", tokenizer_only: bool = False) -> str:
        """Fetch or convert the model, merge the adapter, and return the directory. Raises ModelError and NotNeeded."""
        if not adapter and is_ready(Path(reference)):
            return reference
        # At once: an orchestrator that ends waits for workers that prepare, since they obey Goodbye, and not for those that load.
        self._send_progress({"what": f"preparing {reference}", "done": None, "detail": ""})
        words = [f"--adapter={adapter}"] if adapter else []
        words += ["--tokenizer-only"] if tokenizer_only else []
        with subprocess.Popen(
            [sys.executable, "-m", "dsi_workers.models.preparation", *words, "--", reference],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            progress = _ProgressReader(process)
            try:
                while progress.is_alive():
                    self._send_progress(progress.last)
                    self._check_needed()
                self._send_progress(progress.last)  # it may have ended since
            finally:
                process.kill()  # it has ended, or is no longer needed; what it has fetched stays on the disk
        if "directory" in progress.result:
            return str(progress.result["directory"])
        problem = (
            progress.result.get("error") or f"the process that prepares {reference!r} ended with {process.returncode}"
        )
        raise ModelError(str(problem))

    def _send_progress(self, line: Mapping[str, Any]) -> None:
        if "what" not in line:
            return
        what, done, detail = str(line["what"]), line["done"], str(line["detail"])
        self._report(what, done, detail)
        if time.monotonic() - self._sent_s > _PREPARING_INTERVAL_S:
            self._sent_s = time.monotonic()
            self._socket.try_send(Preparing(what, round(1000 * (done or 0.0))))

    def _check_needed(self) -> None:
        """Raise NotNeeded if this worker is no longer needed."""
        message = self._socket.receive(_CHECK_INTERVAL_S)
        if isinstance(message, Goodbye):
            raise NotNeeded(message)
        if not self._still_needed():
            raise NotNeeded


class _ProgressReader(threading.Thread):
    """A thread that reads the JSON lines of the process. It ends with the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(name="preparation", daemon=True)
        #: The last line of progress, decoded.
        self.last: dict[str, Any] = {}
        #: The line that says how it ended: the directory, or an error.
        self.result: dict[str, Any] = {}
        assert process.stdout is not None
        self._lines = process.stdout
        self.start()

    def run(self) -> None:
        for line in self._lines:
            said = json.loads(line)
            if "what" in said:
                self.last = said
            else:
                self.result = said
