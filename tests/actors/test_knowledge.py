"""What the next generation begins with: measurements of a start, and what others have learnt."""

from __future__ import annotations

import pytest

from dsi_actors.actors.knowledge import Knowledge
from dsi_actors.actors.root import Root
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_actors.config import Config
from dsi_protocol import Hello, Ready

CONFIG = Config(target="T", drafter=("a", "b"))


def join(root: Root, role: str, latency_ms: float, *, kind: str = "", batch_ms: float = 0.0) -> None:
    number = len(root.ready_workers) + 1
    hello = Hello(1, number, role, "auto", "", "cpu:0", "host", 1)
    worker = WorkerHandle(number, b"", hello, role, lambda _: None, kind=kind)
    worker.ready = Ready("", 100, 100, 8, int(latency_ms * 1e3), int(latency_ms * 1.5e3), 4, int(batch_ms * 1e3), 1, 0)
    root.ready_workers.append(worker)


def begun() -> tuple[Knowledge, Root]:
    root = Root(CONFIG)
    join(root, "target", 90.0, batch_ms=90.0 + 31 * 6.0)
    join(root, "target", 100.0, batch_ms=100.0 + 31 * 6.0)
    return Knowledge(CONFIG, lambda: 0), root


def test_it_begins_with_what_the_workers_measured() -> None:
    knowledge, root = begun()
    estimates = knowledge.estimates(root)
    assert (estimates.target_ms, estimates.window_ms, estimates.window) == (100.0, 150.0, 8)
    assert estimates.position_ms == pytest.approx(6.0)
    assert estimates.promised_ms == 100.0
    assert estimates.drafter_ms == 0
    join(root, "drafter", 20.0, kind="b")
    assert knowledge.estimates(root).drafter_ms == 20


def test_what_was_measured_alone_corrects_all_that_was_measured_in_a_crowd() -> None:
    knowledge, root = begun()
    knowledge.measured_alone(root, 50.0)
    estimates = knowledge.estimates(root)
    assert (estimates.target_ms, estimates.calibrated_ms, estimates.window_ms) == (50.0, 50.0, 75.0)
    assert estimates.position_ms == pytest.approx(3.0)


def test_each_drafter_begins_with_what_was_learnt_of_it() -> None:
    knowledge, root = begun()
    join(root, "drafter", 20.0, kind="b")
    join(root, "drafter", 30.0, kind="a")
    pacing = knowledge.pacing(root, "dsi", None, None, position=10)
    assert pacing.kind == "a", "in the order of the configuration"
    assert pacing.tuner.servers == 2
    tuner = pacing.tuner
    for _ in range(100):
        tuner.drafted(1, 25.0)
        tuner.judged(1, 2)
    knowledge.learn(tuner.carry_over(), "a")
    after = knowledge.estimates(root)
    assert after.drafter_ms == pytest.approx(25.0, rel=0.05)
    assert after.acceptance < 0.7


def test_what_was_found_not_to_pay_is_not_begun_with() -> None:
    knowledge, root = begun()
    join(root, "drafter", 20.0, kind="b")
    tuner = knowledge.pacing(root, "dsi", 1, None, position=300).tuner
    assert tuner.choose().max_ahead > 0
    for _ in range(40):
        tuner.paced(1, 500.0)
    assert knowledge.pacing(root, "dsi", 1, None, position=300).tuner.choose().max_ahead == 0
    assert knowledge.pacing(root, "dsi", 1, None, position=3000).tuner.choose().max_ahead > 0
    join(root, "drafter", 30.0, kind="a")
    assert knowledge.pacing(root, "dsi", 1, None, position=300).tuner.choose().max_ahead > 0, "a was not tried"


def test_who_comes_when_others_run_shares() -> None:
    knowledge, root = begun()
    assert knowledge.pacing(root, "dsi", 1, None, position=10).estimates.sharers == 1
    root.generations = dict.fromkeys(range(4))  # type: ignore[assignment]
    assert knowledge.pacing(root, "dsi", 1, None, position=10).estimates.sharers == 3
