"""The golden vectors of a worker's behaviour, played to our loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from dsi_protocol import FromWorker, Reply
from dsi_workers.connection import WorkSocket
from dsi_workers.engine import Task
from dsi_workers.loop import WorkerLoop
from support.engines import CountingEngine, ScriptedSocket
from support.vectors import as_json, cases, from_json, load


def without_free_fields(reply: FromWorker, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `reply` that the vector determines."""
    return {name: value for name, value in as_json(reply).items() if name in expected}


@pytest.mark.parametrize("case", cases("replies.json"))
def test_our_loop_answers_as_the_vectors_say(case: dict[str, Any]) -> None:
    socket = ScriptedSocket()
    loop = WorkerLoop(cast(WorkSocket, socket), CountingEngine(), lambda: True, role=case["role"])
    for step in case["steps"]:
        loop._on_message(from_json(step["message"]))
        while batch := loop._pick():
            loop._step(batch)
        assert len(socket.sent) == len(step["replies"]), socket.sent
        for reply, expected in zip(socket.sent, step["replies"], strict=True):
            assert without_free_fields(reply, expected) == expected
        socket.sent.clear()


class NextTokenEngine(CountingEngine):
    """Chooses each token by the one before it."""

    def __init__(self, following: Mapping[int, int]) -> None:
        super().__init__()
        self._following = following

    def _count(self, task: Task) -> None:
        tokens, answer = task.session.tokens, task.answer.tokens
        answer.append(self._following[tokens[task.start - 1]])
        for position in range(task.start, len(tokens)):
            if tokens[position] != answer[-1]:
                break
            answer.append(self._following[answer[-1]])
        task.done = True


@pytest.mark.parametrize(
    ("role", "following"),
    [("target", {33: 7, 7: 5, 5: 6}), ("drafter", {33: 7, 7: 8, 8: 9, 9: 10, 10: 11, 5: 6, 6: 7})],
)
def test_our_loop_says_what_a_worker_says_in_the_worked_exchange(role: str, following: Mapping[int, int]) -> None:
    """In every field but the times and the number of forwards, which depend on the model."""
    socket, replies = ScriptedSocket(), 0
    loop = WorkerLoop(cast(WorkSocket, socket), NextTokenEngine(following), lambda: True, role=role)
    for line in load("exchange.json")["cases"]:
        message = from_json(line["message"])
        if line["to"] == role:
            loop._on_message(message)
        elif line["from"] == role and isinstance(message, Reply):
            while not socket.sent:
                batch = loop._pick()
                assert batch or socket.sent, f"it has nothing to say where it should say {message}"
                if batch:
                    loop._step(batch)
            said, replies = socket.sent.pop(0), replies + 1
            assert {**as_json(said), "busy_us": 0, "forwards": 0} == {**line["message"], "busy_us": 0, "forwards": 0}
    assert not loop._pick()
    assert (socket.sent, replies) == ([], {"target": 3, "drafter": 5}[role])
    assert loop.farewell is not None
