"""The Ray actor that runs one worker process on its node. Ray imports this module there; it does not import Ray itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from dsi_actors.host.temporary import temporary_directory
from dsi_actors.keys import make_pair, write_worker_key


class WorkerHost:
    """Its methods run in threads: `run` takes as long as the worker lives, and the others are called meanwhile.

    The worker's standard input is a pipe of this process. So the worker ends when Ray ends this process, whatever the reason.
    """

    def __init__(self) -> None:
        self._public, self._secret = make_pair()
        self._process: subprocess.Popen[bytes] | None = None
        #: A signal that came before the process was there.
        self._pending: signal.Signals | None = None
        self._lock = threading.Lock()

    def public_key(self) -> str:
        """The worker's public key. The secret key does not leave this node."""
        return self._public

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str], orchestrator_key: str, device: str | None
    ) -> int:
        """Run a worker to its end and return its exit status, or -N if signal N ended it.

        `arguments`: those of `python -m dsi_actors.worker` without the device and the key. `device`: as --gpu takes it; None:
        the GPUs that Ray gave this actor.
        """
        variables = dict(os.environ)
        if device is None:
            device, variables = chosen_gpus(_gpus(), variables)
        with temporary_directory() as directory:
            key = os.path.join(directory, "worker.key")
            write_worker_key(key, orchestrator=orchestrator_key, public=self._public, secret=self._secret)
            command = [sys.executable, "-m", "dsi_actors.worker", "--gpu", device, "--key", key, *arguments]
            with self._lock:
                # Standard error goes where Ray keeps this actor's: `ray logs`, or the dashboard.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
                    env={**variables, **environment},
                )  # fmt: skip
                if self._pending is not None:
                    self._process.send_signal(self._pending)
            return self._process.wait()

    def terminate(self) -> None:
        """Ask the worker to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker and what it has started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            process = self._process
            if process is None:
                self._pending = number
            elif process.poll() is None:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)  # it leads a session of its own
                else:
                    process.send_signal(number)


def _gpus() -> list[str]:
    """Return the GPUs that Ray gave this actor: numbers, UUIDs, or parts of a GPU."""
    import ray

    return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def chosen_gpus(gpus: Sequence[str], variables: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the GPUs as --gpu takes them, and the environment in which these names are right.

    A number of Ray's is the node's own: without a mask in the environment it is right for CUDA, too, and logs and `status` name
    the physical GPU. A UUID or a part of a GPU can only be chosen by a mask.
    """
    if all(map(str.isdecimal, gpus)):
        return ",".join(gpus), {name: value for name, value in variables.items() if name != "CUDA_VISIBLE_DEVICES"}
    return ",".join(map(str, range(len(gpus)))), {**variables, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
