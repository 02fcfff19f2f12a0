"""Test support: commands and workers that are forked from a process that has imported everything.

An interpreter that imports torch takes two seconds of a core, and most tests start several. A forked process runs the same
`main` with the same arguments, environment and standard streams, and has an exit status of its own. Only the start of the
interpreter is left out. Tests of that start, of signals and of the environment start real commands.

`python -m support.fork_server` is the server. It has one thread, and it ends when its standard input closes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from dsi_actors.launching import choice
from dsi_actors.launching.launcher import INCARNATION_VARIABLE, Exit, LaunchedWorker, WorkerSpec
from dsi_actors.launching.local import LocalLauncher
from support.patience import limit_s

#: Where a forked process finds the server, to fork its own workers there.
_VARIABLE = "DSI_TEST_FORK_SERVER"
#: What may differ from the server's environment: nothing that a library has read when the server imported it.
_READ_LATE = {
    _VARIABLE, INCARNATION_VARIABLE, "DSI_CACHE", "HF_HUB_OFFLINE", "PYTEST_CURRENT_TEST", "PYTHONPATH",
    "TORCHINDUCTOR_CACHE_DIR", "TQDM_DISABLE",
}  # fmt: skip
_IMPORTED = (
    "torch", "safetensors.torch", "dsi_actors.cli.main", "dsi_actors.serving.app", "dsi_actors.serving.server",
    "dsi_actors.worker", "dsi_workers.main", "dsi_workers.engines.loading", "dsi_workers.engines.model",
    "dsi_workers.engines.timed", "dsi_workers.drafting.lookup", "dsi_workers.sampling",
)  # fmt: skip
_MOST_BYTES = 1 << 20
_TESTS = Path(__file__).parents[1]


class OtherEnvironmentError(Exception):
    """A forked process would not see the environment that it should have."""


class Forked:
    """A process that the server forked: `python -m MODULE ARGUMENTS` in a session of its own."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str | Path],
        environment: Mapping[str, str],
        streams: Sequence[IO[bytes] | int],
    ) -> None:
        """`streams`: its standard input, output and error. Raises OtherEnvironmentError."""
        address = environment.get(_VARIABLE) or _server()
        request = {
            "module": module, "arguments": [str(word) for word in arguments], "directory": os.getcwd(),
            "environment": {**environment, _VARIABLE: address},
        }  # fmt: skip
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(address)
            files = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
            socket.send_fds(self._connection, [json.dumps(request).encode()], files)
            answer = json.loads(self._connection.recv(_MOST_BYTES))
            if "differing" in answer:
                raise OtherEnvironmentError(", ".join(answer["differing"]))
        except BaseException:
            self._connection.close()
            raise
        self.pid: int = answer["pid"]

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._connection.fileno()

    def wait(self) -> int:
        """The exit status, or -N if signal N ended the process. Raises TimeoutError. Called once."""
        with self._connection:
            self._connection.settimeout(limit_s(180))
            status: int = json.loads(self._connection.recv(_MOST_BYTES))["status"]
        return status


def run_forked(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of `python -m MODULE ARGUMENTS`, with what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
        try:
            status = Forked(module, arguments, os.environ, (nothing, out, err)).wait()
        except OtherEnvironmentError:
            words = [sys.executable, "-m", module, *arguments]
            return subprocess.run(words, capture_output=True, text=True, timeout=limit_s(180), check=False)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([module, *arguments], status, *said)


class ForkingLauncher(LocalLauncher):
    """Forks the workers that LocalLauncher starts."""

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        environment = {**os.environ, **spec.environment(incarnation)}
        theirs, ours = os.pipe()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            words = ["--gpu", spec.device, *spec.arguments()]
            process = Forked("dsi_actors.worker", words, environment, (theirs, nowhere, 2))
        except OtherEnvironmentError:
            os.close(ours)
            return await super().start(spec, incarnation)
        finally:
            os.close(theirs)
            os.close(nowhere)
        return _Worker(process, ours)


class _Worker(LaunchedWorker):
    def __init__(self, process: Forked, standard_input: int) -> None:
        self._process = process
        self._input = standard_input
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[Exit] = self._loop.create_future()
        self._loop.add_reader(process.fileno(), self._ended)

    def _ended(self) -> None:
        self._loop.remove_reader(self._process.fileno())
        os.close(self._input)
        self._exit.set_result(Exit(self._process.wait()))

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    @property
    def process_id(self) -> int | None:
        return self._process.pid

    def _signal(self, number: signal.Signals) -> None:
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)


@functools.cache
def _server() -> str:
    """The address of this process's server, which it starts."""
    directory = tempfile.TemporaryDirectory(prefix="dsi-fork-")
    address = f"{directory.name}/server.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server"], stdin=subprocess.PIPE, pass_fds=[listener.fileno()],
            env={**os.environ, _VARIABLE: str(listener.fileno())}, cwd=_TESTS,
        )  # fmt: skip

    def end() -> None:
        process.communicate()
        directory.cleanup()

    atexit.register(end)
    return address


def _serve(listener: socket.socket) -> Callable[[], int]:
    """Forks what it is asked for. Returns in each forked process: what that has to do."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each forked process would copy these objects when it collects its own
    waiting: dict[int, socket.socket] = {}
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    selector = selectors.DefaultSelector()
    for file in (0, listener, woken):
        selector.register(file, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os._exit(0)
            if key.fileobj is woken:
                woken.recv(_MOST_BYTES)
                _tell_of_ends(waiting)
                continue
            connection, _ = listener.accept()
            text, files, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
            request = json.loads(text)
            if differing := _differing(request["environment"]):
                connection.sendall(json.dumps({"differing": differing}).encode())
                connection.close()
            elif pid := os.fork():
                waiting[pid] = connection
                connection.sendall(json.dumps({"pid": pid}).encode())
            else:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                selector.close()
                for each in (listener, woken, wakes, connection, *waiting.values()):
                    each.close()
                return functools.partial(_become, request, files)
            for file in files:
                os.close(file)


def _differing(environment: Mapping[str, str]) -> list[str]:
    names = (environment.keys() | os.environ.keys()) - _READ_LATE
    return sorted(name for name in names if environment.get(name) != os.environ.get(name))


def _tell_of_ends(waiting: dict[int, socket.socket]) -> None:
    while waiting:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with waiting.pop(pid) as connection, contextlib.suppress(OSError):
            connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())


def _become(request: dict[str, object], files: Sequence[int]) -> int:
    os.setsid()
    for number, (stream, file) in enumerate(zip(("stdin", "stdout", "stderr"), files, strict=True)):
        os.dup2(file, number)
        os.close(file)
        # A stream of its own: the server's knows whether the server's file can seek.
        old = getattr(sys, stream)
        buffering = 1 if stream == "stderr" else -1
        setattr(sys, stream, open(number, old.mode, buffering, old.encoding, old.errors, closefd=False))  # noqa: SIM115
    environment, arguments, name = request["environment"], request["arguments"], request["module"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path not in ("", *sys.path)]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["directory"]))
    module = importlib.import_module(str(name))
    sys.argv = [str(module.__file__), *arguments]
    sys.orig_argv = [sys.executable, "-m", str(name), *arguments]
    choice.LocalLauncher = ForkingLauncher  # type: ignore[attr-defined]
    status: int = module.main()
    return status


def _run(program: Callable[[], int]) -> None:
    """What an interpreter does at its end, but that it does not take apart what the server had imported."""
    try:
        status = program()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(os.environ[_VARIABLE]))))
