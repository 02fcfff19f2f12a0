"""Generations run while workers are killed, stopped, joined and sent away, and while the network loses their messages.

What is promised: every generation ends, with the text that plain decoding gives without any fault, and nothing is left
behind. Recovery is the time from a fault to the next token of each generation that was running.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsi_actors.chaos.processes import alive, children, descriptors, resident_bytes, send
from dsi_actors.chaos.proxy import DISTURBANCES, Proxy
from dsi_actors.config import TIMED, Algorithm, Config, Sampling
from dsi_actors.errors import DsiError
from dsi_actors.host.temporary import socket_directory
from dsi_actors.logs import get_logger
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.percentiles import percentile
from dsi_actors.root import Root

log = get_logger("chaos")

_SOCKET = "proxy.sock"
_PROMPTS = 6
_PARALLEL = 2
_ALGORITHMS: tuple[Algorithm, ...] = ("dsi", "dsi", "dsi", "si", "ar")
#: Workers that come and go by themselves, beside those that the orchestrator started. Groups are many processes: fewer.
_GUESTS, _GUESTS_BESIDE_GROUPS = ("target", "target", "drafter"), ("target",)
#: After so long what is still there is left behind.
_END_S = 10.0
#: A recovery of so many detection times is worth a line in the log.
_SLOW = 2.0
#: What happens, and how often in comparison.
FAULTS: dict[str, int] = {
    "kill a target": 4, "kill a drafter": 3, "kill all targets": 1, "stop a target": 3, "stop a drafter": 2,
    "join": 2, "leave": 2, "drop": 3, "delay": 2, "duplicate": 2, "reorder": 2,
}  # fmt: skip
#: What happens beside that where target servers are groups: to a rank that is not the first.
FAULTS_OF_GROUPS = {"kill a rank": 4, "stop a rank": 4}


@dataclass(slots=True)
class Outcome:
    faults: Counter[str] = field(default_factory=Counter)
    generations: int = 0
    tokens: int = 0
    #: Ended with an error, or not at all. And why.
    lost: int = 0
    differing: int = 0
    errors: list[str] = field(default_factory=list)
    #: From each fault to the next token of each generation that was running.
    recovery_s: list[tuple[str, float]] = field(default_factory=list)
    disturbed_frames: Counter[str] = field(default_factory=Counter)
    worker_start_s: list[float] = field(default_factory=list)
    restarts: int = 0
    leaked_processes: int = 0
    leaked_descriptors: int = 0
    #: What those are: files, sockets, pipes.
    leaked: list[str] = field(default_factory=list)
    grown_bytes: int = 0


class _BehindProxy(Orchestrator):
    """Its local workers connect through the proxy."""

    def __init__(self, config: Config, directory: Path, seed: int) -> None:
        super().__init__(config)
        self._listen = f"ipc://{directory / _SOCKET}"
        self._seed = seed
        self.proxy: Proxy | None = None

    async def _start_local_workers(self, root: Root) -> None:
        self.proxy = Proxy(self._listen, self.endpoint, self._seed)
        await self.proxy.__aenter__()
        self.endpoint = self._listen
        await super()._start_local_workers(root)


@dataclass(slots=True, eq=False)
class _Running:
    """A generation that has begun to answer."""

    #: When the faults came that it has not recovered from: none of its tokens came since.
    faults_s: list[tuple[str, float]] = field(default_factory=list)

    def recover(self) -> list[tuple[str, float]]:
        """It has a token, or has ended: how long each of these faults lasted for it."""
        now_s = time.monotonic()
        lasted, self.faults_s = [(kind, now_s - fault_s) for kind, fault_s in self.faults_s], []
        return lasted


class Chaos:
    """One run of `seconds`, or until `faults` happened. The same seed gives the same sequence of faults, though not the
    same moments. `kinds`: only these faults; empty: all that there are for these workers."""

    def __init__(
        self, *, seconds: float, faults: float, seed: int, tokens: int, pause_s: float, config: Config,
        kinds: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.outcome = Outcome()
        self._seconds = seconds
        self._faults = faults
        self._tokens = tokens
        self._pause_s = pause_s
        self._config = config
        possible = {**FAULTS, **(FAULTS_OF_GROUPS if config.tp > 1 else {})}
        self._kinds = {kind: weight for kind, weight in possible.items() if not kinds or kind in kinds}
        self._guest_roles = _GUESTS if config.tp == 1 else _GUESTS_BESIDE_GROUPS
        self._seed = seed
        self._random = random.Random(seed)
        self._generations: set[_Running] = set()
        self._guests: dict[asyncio.subprocess.Process, str] = {}
        self._stopped: dict[int, asyncio.TimerHandle] = {}
        self._known: set[int] = set()
        self._texts: list[list[int]] = []

    async def run(self) -> Outcome:
        outcome = self.outcome
        with socket_directory(_SOCKET) as directory:
            self._texts = await self._plain_decoding()
            before = descriptors()
            orchestrator = _BehindProxy(self._config, Path(directory), self._seed)
            try:
                async with orchestrator:
                    await self._run_with(orchestrator)
            finally:
                await self._end_guests()
                if orchestrator.proxy is not None:
                    await orchestrator.proxy.__aexit__()
                    outcome.disturbed_frames.update(orchestrator.proxy.disturbed)
            end_s = time.monotonic() + _END_S
            while True:  # what was closed and killed needs a moment to be gone
                now = descriptors()
                outcome.leaked_descriptors = max(0, len(now) - len(before))
                outcome.leaked = sorted(name for number, name in now.items() if number not in before)
                outcome.leaked_processes = sum(alive(process) for process in self._known)
                if not (outcome.leaked_descriptors or outcome.leaked_processes) or time.monotonic() > end_s:
                    break
                await asyncio.sleep(0.1)
        return outcome

    async def _run_with(self, orchestrator: _BehindProxy) -> None:
        for role in self._guest_roles:
            await self._invite(role, orchestrator.endpoint)
        targets, drafters = self._config.local_servers, len(self._config.drafters)
        await orchestrator.wait_for_workers(
            targets=targets + self._guest_roles.count("target"), drafters=drafters + self._guest_roles.count("drafter"),
            timeout_s=self._config.ready_timeout_s,
        )  # fmt: skip
        self._note(orchestrator)
        grown_from = resident_bytes()
        deadline_s = time.monotonic() + self._seconds

        def left_s() -> float:
            return deadline_s - time.monotonic() if self.outcome.faults.total() < self._faults else 0.0

        async with asyncio.TaskGroup() as group:
            for number in range(_PARALLEL):
                group.create_task(self._generate(orchestrator, left_s, random.Random(self._seed + 1 + number)))
            await self._harm(orchestrator, left_s)
        self.outcome.grown_bytes = resident_bytes() - grown_from

    # Generations

    async def _plain_decoding(self) -> list[list[int]]:
        """The same target, without drafter, faults, or anything that takes time."""
        no_time = {"latency_ms": 0.0} if self._config.engine == TIMED else {}
        options = {**self._config.target_options, **no_time}
        quiet = replace(self._config, sp=1, drafter=None, target_options=options)
        texts: list[list[int]] = []
        async with Orchestrator(quiet) as orchestrator:
            for prompt in range(_PROMPTS):
                stream = orchestrator.generate(self._prompt(prompt), Sampling(max_tokens=self._tokens), algorithm="ar")
                texts.append([token async for tokens in stream for token in tokens])
        return texts

    @staticmethod
    def _prompt(number: int) -> tuple[int, ...]:
        return (1 + number, 2, 3)

    async def _generate(self, orchestrator: Orchestrator, left_s: Callable[[], float], choices: random.Random) -> None:
        while left_s() > 0:
            prompt = choices.randrange(_PROMPTS)
            algorithm = choices.choice(_ALGORITHMS)
            running = _Running()
            text: list[int] = []
            try:
                async for tokens in orchestrator.generate(
                    self._prompt(prompt), Sampling(max_tokens=self._tokens), algorithm=algorithm
                ):
                    text.extend(tokens)
                    self._generations.add(running)
                    self._note_recovery(running)
            except DsiError as error:
                self.outcome.lost += 1
                self.outcome.errors.append(str(error))
            else:
                self.outcome.differing += text != self._texts[prompt]
            finally:
                self._generations.discard(running)
                self._note_recovery(running)
            self.outcome.generations += 1
            self.outcome.tokens += len(text)

    def _note_recovery(self, running: _Running) -> None:
        for kind, lasted_s in running.recover():
            self.outcome.recovery_s.append((kind, lasted_s))
            if lasted_s > _SLOW * self._config.silence_ms / 1e3:
                log.warning("slow recovery", fault=kind, after_s=round(lasted_s, 2))

    # Faults

    async def _harm(self, orchestrator: _BehindProxy, left_s: Callable[[], float]) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while (rest_s := left_s()) > 0:
            await asyncio.sleep(min(rest_s, self._random.uniform(0.5, 1.5) * self._pause_s))
            self._note(orchestrator)
            kind = self._random.choices(kinds, weights)[0]
            if await self._do(kind, orchestrator):
                log.info("fault", kind=kind)
                self.outcome.faults[kind] += 1
                for running in self._generations:
                    running.faults_s.append((kind, time.monotonic()))
        for process in list(self._stopped):
            self._continue(process)

    async def _do(self, kind: str, orchestrator: _BehindProxy) -> bool:
        """Whether there was somebody to whom it could be done."""
        what, *role = kind.split(" a ")
        if kind == "kill all targets":
            return sum([send(process, signal.SIGKILL) for process in self._processes(orchestrator, "target")]) > 0
        if role:
            victims = [each for each in self._processes(orchestrator, *role) if each not in self._stopped]
            if not victims:
                return False
            victim = self._random.choice(victims)
            if what == "kill":
                return send(victim, signal.SIGKILL)
            self._stopped[victim] = asyncio.get_running_loop().call_later(
                self._random.uniform(0.1, 2.5 * self._config.silence_ms / 1e3), self._continue, victim
            )
            return send(victim, signal.SIGSTOP)
        if kind == "join":
            if len(self._guests) >= 2 * len(self._guest_roles):
                return False
            await self._invite(self._random.choice(self._guest_roles), orchestrator.endpoint)
            return True
        if kind == "leave":
            guests = [process for process in self._guests if process.returncode is None]
            return bool(guests) and send(self._random.choice(guests).pid, signal.SIGTERM)
        assert orchestrator.proxy is not None
        [disturbance] = [each for each in DISTURBANCES if each == kind]
        orchestrator.proxy.disturb(disturbance, self._random.uniform(0.3, 1.5) * self._pause_s)
        return True

    def _continue(self, process: int) -> None:
        timer = self._stopped.pop(process, None)
        if timer is not None:
            timer.cancel()
            send(process, signal.SIGCONT)

    @staticmethod
    def _processes(orchestrator: Orchestrator, role: str) -> list[int]:
        """`rank`: those of groups that are not the first."""
        if role == "rank":
            return children(Chaos._processes(orchestrator, "target"))
        return [worker.hello.process for worker in orchestrator.workers if worker.role == role]

    # Workers

    async def _invite(self, role: str, endpoint: str) -> None:
        device = ",".join(["cpu"] * (self._config.tp if role == "target" else 1))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dsi_actors.worker", "--gpu", device, "--role", role, "--connect", endpoint,
            "--log-level", "error", "--supervised",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._guests[process] = role
        self._known.add(process.pid)
        for gone in [guest for guest in self._guests if guest.returncode is not None]:
            del self._guests[gone]

    async def _end_guests(self) -> None:
        for process in self._guests:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        await asyncio.gather(*(process.wait() for process in self._guests))

    def _note(self, orchestrator: Orchestrator) -> None:
        """Remember every process that ever was, and how long workers took to start."""
        for process in orchestrator.process_ids:
            if process not in self._known:
                self._known.add(process)
                self.outcome.restarts += 1
        self._known.update(children(list(self._known)))
        assert orchestrator._root is not None
        assert orchestrator._root.supervisor is not None
        self.outcome.worker_start_s = list(orchestrator._root.supervisor.start_times_s)


def as_dict(outcome: Outcome, config: Config) -> dict[str, Any]:
    """What is printed. Percentiles of an empty list are 0."""
    by_kind = {kind: [time_s * 1e3 for k, time_s in outcome.recovery_s if k == kind] for kind in outcome.faults}
    recovery_ms = [time_s * 1e3 for _, time_s in outcome.recovery_s]
    return {
        "faults": sum(outcome.faults.values()),
        "faults_by_kind": dict(outcome.faults),
        "disturbed_frames": dict(outcome.disturbed_frames),
        "generations": outcome.generations,
        "tokens": outcome.tokens,
        "lost": outcome.lost,
        "differing": outcome.differing,
        "errors": outcome.errors[:10],
        "recovery_p50_ms": percentile(recovery_ms, 50),
        "recovery_p95_ms": percentile(recovery_ms, 95),
        "recovery_max_ms": max(recovery_ms, default=0.0),
        "recovery_p95_ms_by_kind": {kind: round(percentile(times_ms, 95)) for kind, times_ms in by_kind.items()},
        "detection_ms": config.silence_ms,
        "worker_start_ms": statistics.median(outcome.worker_start_s or [0.0]) * 1e3,
        "workers_started_again": outcome.restarts,
        "leaked_processes": outcome.leaked_processes,
        "leaked_descriptors": outcome.leaked_descriptors,
        "leaked": outcome.leaked,
        "grown_bytes": outcome.grown_bytes,
    }
