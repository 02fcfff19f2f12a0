"""Workers on a Ray cluster. Ray chooses a node and a GPU for each and tells when one is gone; tokens never travel through Ray.

Each worker has a placement group of its own with one bundle, in which an actor (ray_host.py) runs the worker process. A target
server with several GPUs (tensor parallelism) has all of them in that bundle, so on one node. Ray's autoscaler sees each worker
without a place as demand. If a worker dies, that worker alone is placed again: the supervisor restarts workers, and Ray restarts
nothing. The worker dials the orchestrator over ZeroMQ with a CURVE key that was made on its node: only public keys travel through
Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private import services
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dsi_actors.errors import ConfigError
from dsi_actors.keys import MemoryKeyring
from dsi_actors.launching.launcher import Exit, LaunchedWorker, Launcher, LaunchError, WorkerSpec
from dsi_actors.launching.ray_host import WorkerHost
from dsi_actors.logs import get_logger

log = get_logger("ray")

#: A warning says after so many seconds that a worker still waits for a place.
_PENDING_S = 10.0
#: After `kill`, a worker that is not gone for so many seconds has a node that does not answer: its actor is given up.
_UNREACHABLE_S = 2.0
#: How long the cluster's head may take to accept a connection.
_PROBE_S = 10.0
#: Two calls of the actor beside `run`, which takes as long as the worker lives.
_THREADS = 3


@dataclass(frozen=True, slots=True)
class _Place:
    """A placement group, and the actor in it. Both may still wait for a node."""

    group: PlacementGroup
    host: Any

    def release(self) -> None:
        """End the actor and give its place back."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self.host)
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(self.group)


class RayLauncher(Launcher):
    """`address`: of the cluster, as `ray.init` takes it; None: the cluster that runs on this machine. A program that has
    called `ray.init` itself keeps its connection."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        self._connected_here = False
        self._numbers = itertools.count(1)
        self._keyring = MemoryKeyring()
        self.keyring = self._keyring

    async def open(self) -> str:
        if not ray.is_initialized():
            # In a thread, Ray leaves the handlers of signals alone: the orchestrator has its own.
            await asyncio.to_thread(self._connect)
            self._connected_here = True
        host = str(ray.util.get_node_ip_address())
        return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"

    def _connect(self) -> None:
        try:
            address = services.canonicalize_bootstrap_address_or_die(self._address or "auto")
            # Ray itself would try for minutes to reach a head that is not there, and then end the process.
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
            logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that it leaves SIGTERM alone
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            where = "on this machine" if self._address is None else f"at {self._address}"
            raise ConfigError(
                f"no Ray cluster answers {where}: start one with `ray start --head`, or give --ray-address ({error})"
            ) from None

    async def start(self, spec: WorkerSpec, incarnation: int) -> LaunchedWorker:
        name = f"dsi-{spec.role}-{next(self._numbers)}"
        devices = spec.device.split(",")
        gpus = devices.count("gpu")
        # Ray's calls may wait for its head: in a thread, they do not hold up generations.
        asking = asyncio.ensure_future(
            asyncio.to_thread(_ask_for_place, f"{name}-{incarnation:016x}", len(devices), gpus)
        )
        try:
            place = await asyncio.shield(asking)
            public = await self._placed(name, place.host.public_key.remote().future())
            self._keyring.allow(public, name)
            environment = dict(spec.environment(incarnation))
            asked = (spec.arguments(), environment, self._keyring.public, None if gpus else spec.device)
            run = place.host.run.remote(*asked).future()
        except BaseException as error:
            await asyncio.shield(asyncio.create_task(_give_back(asking)))
            if isinstance(error, ray.exceptions.RayError):
                raise LaunchError(f"Ray could not place it: {error}") from error
            raise
        return _RayWorker(self._keyring, public, place, run)

    async def _placed(self, name: str, answer: Future[str]) -> str:
        waiting = asyncio.wrap_future(answer)
        try:
            done, _ = await asyncio.wait([waiting], timeout=_PENDING_S)
            if not done:
                log.warning("a worker waits for a free place in the Ray cluster (see `ray status`)", worker=name)
            return await waiting
        finally:
            waiting.cancel()

    async def close(self) -> None:
        if self._connected_here:
            await asyncio.to_thread(ray.shutdown)


class _RayWorker(LaunchedWorker):
    def __init__(self, keyring: MemoryKeyring, public: str, place: _Place, run: Future[int]) -> None:
        self._keyring = keyring
        self._public = public
        self._place = place
        self._run = asyncio.wrap_future(run)
        self._exit = asyncio.create_task(self._until_released())
        self._killing: asyncio.Task[None] | None = None

    def terminate(self) -> None:
        if not self._run.done():
            self._place.host.terminate.remote()

    def kill(self) -> None:
        if not self._run.done() and self._killing is None:
            self._killing = asyncio.create_task(self._until_killed())

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    async def _until_killed(self) -> None:
        self._place.host.kill.remote()
        await asyncio.wait([self._run], timeout=_UNREACHABLE_S)
        if not self._run.done():
            # The node does not answer. If it lives, the end of the actor closes the worker's standard input, and the worker ends.
            with contextlib.suppress(ray.exceptions.RayError):
                await asyncio.to_thread(ray.kill, self._place.host)

    async def _until_released(self) -> Exit:
        """Return when the worker has ended and its place in the cluster is free again."""
        try:
            code = Exit(await self._run)
        except ray.exceptions.RayError as error:
            log.info("the actor of a worker is gone", reason=str(error).partition("\n")[0])
            code = Exit(None)
        self._keyring.forbid(self._public)
        await asyncio.to_thread(self._place.release)
        return code


def _ask_for_place(name: str, cpus: int, gpus: int) -> _Place:
    group = placement_group([{"CPU": cpus, **({"GPU": gpus} if gpus else {})}], strategy="STRICT_PACK", name=name)
    options = {
        "name": name, "num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": _THREADS,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        # CUDA_VISIBLE_DEVICES is left alone: see ray_host.py.
        "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},
    }  # fmt: skip
    try:
        return _Place(group, ray.remote(WorkerHost).options(**options).remote())
    except BaseException:
        remove_placement_group(group)
        raise


async def _give_back(asking: asyncio.Future[_Place]) -> None:
    """Release the place, also if it is still being asked for."""
    with contextlib.suppress(ray.exceptions.RayError):
        place = await asking
        await asyncio.to_thread(place.release)
