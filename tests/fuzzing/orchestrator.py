"""Faulty workers against the whole orchestrator, in one process and without sockets: `make fuzz`.

The workers are real (the loop of dsi_workers over an engine that counts), and what they say is disturbed: lost, doubled, late,
changed in a field, forged; and strangers say whatever they like. One target server stays honest, so that every
generation must end, with the right text. What cannot be noticed is left out: a target server that lies plausibly.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

from dsi_actors.config import Algorithm, Config, Sampling
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.transport.gateway import PeerGone
from dsi_actors.workforce.workforce import Workforce
from dsi_protocol import (
    Cancelled,
    CloseGeneration,
    Drafted,
    Failed,
    FromOrchestrator,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    NeedPrefix,
    Ready,
    Verified,
    Welcome,
)
from dsi_workers.connection import WorkSocket
from dsi_workers.loop import WorkerLoop
from support.engines import CountingEngine, ScriptedSocket
from support.patience import patience

PROMPT, TOKENS, VOCABULARY = (10, 11, 12), 40, 1000
TEXT = list(range(13, 13 + TOKENS))
_BEAT_S = 0.01
_GENERATIONS = 5


class Worker:
    """One that disturbs what it says with probability `harm`."""

    def __init__(self, role: str, harm: float, draw: random.Random) -> None:
        self.role, self.harm, self.draw = role, harm, draw
        self.incarnation = draw.getrandbits(64)
        self.identity = b"w" + self.incarnation.to_bytes(8, "little")
        self.alive = True
        self.socket = ScriptedSocket()
        self.engine = CountingEngine()
        self.ready = Ready("count", VOCABULARY, 64, 8, 1, 1, 4, 1, 1, 0)
        self.loop = WorkerLoop(cast(WorkSocket, self.socket), self.engine, lambda: True, self.ready, role=role)

    def hello(self) -> Hello:
        return Hello(1, self.incarnation, self.role, "auto", "", "cpu:0", "fuzz", 1)

    def hear(self, message: FromOrchestrator) -> list[FromWorker]:
        """What it says to that, disturbed."""
        if isinstance(message, Goodbye):
            self.alive = False
            return []
        if isinstance(message, Welcome):
            return [self.ready]
        if isinstance(message, Heartbeat):
            return []
        self.loop._on_message(message)
        while batch := self.loop._pick():
            self.loop._step(batch)
        said, self.socket.sent = self.socket.sent, []
        return [each for reply in said for each in self.disturbed(reply)]

    def disturbed(self, reply: FromWorker) -> list[FromWorker]:
        if self.draw.random() >= self.harm:
            return [reply]
        match self.draw.randrange(6):
            case 0:
                return []
            case 1:
                return [reply, reply]
            case 2:
                return [self.changed(reply), reply]
            case 3:
                return [*(self.forged() for _ in range(self.draw.randint(1, 12))), reply]
            case 4:
                return [self.changed(reply)]
            case _:
                return [reply, Goodbye("enough")]

    def changed(self, reply: FromWorker) -> FromWorker:
        """With another value in one field; of a target server's answer only what can be noticed."""
        names = [field.name for field in fields(reply)]
        if isinstance(reply, Verified):
            names = ["generation", "attempt", "start", "forwards", "busy_us"]
        name = self.draw.choice(names)
        now = getattr(reply, name)
        new: Any = now
        if isinstance(now, bool):
            new = not now
        elif isinstance(reply, Verified):  # the name of another answer that is due would make it a plausible lie
            new = self.draw.choice((0, now + 1000, 2**32 - 1))
        elif isinstance(now, int):
            new = self.draw.choice((0, 1, max(0, now - 1), now + 1, now + 1000, 2**32 - 1))
        elif isinstance(now, tuple):
            new = self.draw.choice(((), now[:1], (*now, 5), (VOCABULARY + 1,) * 3, (1,) * 200))
        elif isinstance(now, str):
            new = self.draw.choice(("", "draining", "unknown_generation", "x" * 4000))
        return replace(reply, **{name: new})

    def forged(self) -> FromWorker:
        draw = self.draw
        generation, attempt = draw.choice((0, 1, 2, 9)), draw.randrange(60)
        makers: list[Callable[[], FromWorker]] = [
            lambda: Verified(generation, 10**9 + attempt, 5, (1, 2), (), 1, 1),
            lambda: Drafted(generation, attempt, draw.randrange(60), tuple(range(draw.randrange(9))), True, 1),
            lambda: Drafted(generation, attempt, draw.randrange(60), (5, 6), False, 1),
            lambda: Cancelled(generation, attempt, 1, 1),
            lambda: NeedPrefix(generation, attempt, draw.randrange(60)),
            lambda: Failed(generation, attempt, draw.choice(("engine", "limit", "draining", "?")), "no"),
            lambda: self.ready,
            self.hello,
            lambda: Heartbeat(draw.getrandbits(64), 1),
        ]
        if self.role == "target":  # a forged draft from a target server is noticed, one from a drafter is a guess
            makers.append(lambda: cast(FromWorker, CloseGeneration(generation)))
        return draw.choice(makers)()


class Stage:
    """An orchestrator whose network is this object."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.workers: dict[bytes, Worker] = {}
        self.workforce: Workforce | None = None
        self.joined = 0

    def join(self, role: str, harm: float) -> None:
        worker = Worker(role, harm, self.draw)
        self.workers[worker.identity] = worker
        self.joined += 1
        self.say(worker.identity, worker.hello())

    def say(self, identity: bytes, message: Message) -> None:
        assert self.workforce is not None
        self.workforce._on_frame(identity, message)

    def send(self, identity: bytes, message: FromOrchestrator) -> None:
        """In place of the gateway's."""
        worker = self.workers.get(identity)
        if worker is None or not worker.alive:
            raise PeerGone
        asyncio.get_running_loop().call_soon(self._hear, worker, message)

    def _hear(self, worker: Worker, message: FromOrchestrator) -> None:
        for reply in worker.hear(message):
            if self.draw.random() < 0.2 * worker.harm:
                asyncio.get_running_loop().call_later(self.draw.random() * 0.02, self.say, worker.identity, reply)
            else:
                self.say(worker.identity, reply)

    async def beat(self) -> None:
        while True:
            for identity, worker in list(self.workers.items()):
                if worker.alive:
                    self.say(b"h" + identity, Heartbeat(worker.incarnation, 1))
                else:
                    del self.workers[identity]
                    if self.joined < 60:
                        self.join(worker.role, worker.harm)
            stranger = Worker("target", 1.0, self.draw)
            for _ in range(3):
                self.say(self.draw.randbytes(5), stranger.forged())
            await asyncio.sleep(_BEAT_S)


async def run_once(seed: int) -> int:
    """One generation among faulty workers. How many workers it wore out. Raises AssertionError."""
    stage = Stage(seed)
    config = Config(
        engine="timed", listen="tcp://127.0.0.1:*", heartbeat_ms=20, silence_ms=300,
        request_timeout_s=2.0, sp=3, log_level="error",
    )  # fmt: skip
    async with Orchestrator(config) as orchestrator:
        assert orchestrator._root is not None
        stage.workforce = orchestrator._root.workforce
        assert stage.workforce._gateway is not None
        stage.workforce._gateway.send = stage.send  # type: ignore[method-assign]
        beating = asyncio.create_task(stage.beat())
        stage.join("target", 0.0)
        harm = stage.draw.choice((0.05, 0.2, 0.6))
        for role in ("target", "target", "drafter", "drafter"):
            stage.join(role, harm)
        algorithms: tuple[Algorithm, ...] = ("dsi", "dsi", "si", "ar")
        try:
            for number in range(_GENERATIONS):
                text: list[int] = []
                async with patience(60):
                    async for tokens in orchestrator.generate(
                        PROMPT, Sampling(max_tokens=TOKENS), algorithm=stage.draw.choice(algorithms),
                        lookahead=stage.draw.choice((1, 2, 5)),
                    ):  # fmt: skip
                        text.extend(tokens)
                assert text == TEXT, f"generation {number} of seed {seed}: {text}"
        except TimeoutError:
            raise AssertionError(f"seed {seed} hangs") from None
        finally:
            beating.cancel()
        return stage.joined


async def run(runs: int, seed: int) -> int:
    return sum([await run_once(seed + number) for number in range(runs)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    joined = asyncio.run(run(arguments.runs, arguments.seed))
    took_s = time.monotonic() - begun
    sys.stdout.write(f"{_GENERATIONS * arguments.runs} generations right among {joined} workers, in {took_s:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
