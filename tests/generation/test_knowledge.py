"""What the next generation begins with: measurements of a start, and what others have learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsi_actors.config import Config
from dsi_actors.core.actions import Judged
from dsi_actors.generation.knowledge import Knowledge, can_overlap, rows_of_trees
from dsi_actors.planning.arms import TOGETHER
from dsi_actors.planning.controller import Controller
from dsi_actors.planning.estimates import Estimates
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Hello, Ready

CONFIG = Config(target="T", drafter=("a", "b"))


class Workers:
    """What an orchestrator knows of its workers and generations."""

    def __init__(self) -> None:
        self.ready: list[WorkerHandle] = []
        self.running = 0
        self.knowledge = Knowledge(CONFIG, self.of_role, lambda: self.running)
        self.join("target", 90.0, batch_ms=90.0 + 31 * 6.0)
        self.join("target", 100.0, batch_ms=100.0 + 31 * 6.0)

    def of_role(self, role: str) -> list[WorkerHandle]:
        return [worker for worker in self.ready if worker.role == role]

    def join(
        self, role: str, latency_ms: float, *, kind: str = "", batch_ms: float = 0.0, device: str = "cpu:0"
    ) -> WorkerHandle:
        number = len(self.ready) + 1
        hello = Hello(1, number, role, "auto", "", device, "host", 1)
        worker = WorkerHandle(number, b"", hello, role, lambda _: None, kind=kind)
        latency_us = int(latency_ms * 1e3)
        worker.ready = Ready("", 100, 100, 8, latency_us, latency_us * 3 // 2, 4, int(batch_ms * 1e3), 1, 0)
        self.ready.append(worker)
        return worker


def test_it_begins_with_what_the_workers_measured() -> None:
    workers = Workers()
    estimates = workers.knowledge.estimates()
    assert (estimates.target_ms, estimates.window_ms, estimates.window) == (100.0, 150.0, 8)
    assert estimates.position_ms == pytest.approx(6.0)
    assert estimates.promised_ms == 100.0
    assert estimates.drafter_ms == 0
    workers.join("drafter", 20.0, kind="b")
    assert workers.knowledge.estimates().drafter_ms == 20


def test_what_was_measured_alone_corrects_all_that_was_measured_in_a_crowd() -> None:
    knowledge = Workers().knowledge
    knowledge.measured_alone(50.0)
    estimates = knowledge.estimates()
    assert (estimates.target_ms, estimates.calibrated_ms, estimates.window_ms) == (50.0, 50.0, 75.0)
    assert estimates.position_ms == pytest.approx(3.0)


def test_each_drafter_begins_with_what_was_learnt_of_it() -> None:
    workers = Workers()
    workers.join("drafter", 20.0, kind="b")
    workers.join("drafter", 30.0, kind="a")
    controller = workers.knowledge.controller("dsi", None, None, position=10)
    assert controller.drafter == "a", "in the order of the configuration"
    assert controller.tuner.servers == 2
    for _ in range(100):
        controller.tuner.drafted(1, 25.0)
        controller.tuner.judged(Judged(accepted=1, judged=2))
    workers.knowledge.learn(controller.tuner.carry_over(), "a", 110, 100)
    after = workers.knowledge.estimates()
    assert after.drafter_ms == pytest.approx(25.0, rel=0.05)
    assert after.acceptance < 0.7
    assert workers.knowledge.guesser(["b"], 10, 20.0).drafter_ms == 20.0


def learn(knowledge: Knowledge, target_ms: float, *, position: int, tokens: int = 1000) -> None:
    knowledge.learn(Estimates(target_ms, target_ms, 8, calibrated_ms=target_ms), "", position, tokens)


def test_a_long_text_teaches_nothing_to_short_ones() -> None:
    """Its forwards take longer: a short text that begins then was planned with their latency."""
    knowledge = Workers().knowledge
    learn(knowledge, 40.0, position=100)
    learn(knowledge, 90.0, position=4000)
    assert knowledge.estimates(50).target_ms == 40.0
    assert knowledge.estimates(3500).target_ms == 90.0
    assert knowledge.estimates(100_000).target_ms == 90.0, "what is nearest"


def test_a_short_generation_changes_little_of_what_longer_ones_learnt() -> None:
    knowledge = Workers().knowledge
    learn(knowledge, 40.0, position=100)
    learn(knowledge, 80.0, position=100, tokens=8)
    assert knowledge.estimates(50).target_ms == pytest.approx(45.0)


def test_what_was_found_not_to_pay_is_not_begun_with() -> None:
    workers = Workers()
    workers.join("drafter", 20.0, kind="b")

    def begun(position: int) -> Controller:
        controller = workers.knowledge.controller("dsi", 1, None, position=position)
        controller.begin()
        return controller

    controller = begun(300)
    assert controller.tuner.drafting
    for _ in range(40):
        controller.committed(1, 500.0, 300, drafts=True, drafters=["b"])
    assert not begun(300).tuner.drafting
    assert begun(3000).tuner.drafting
    workers.join("drafter", 30.0, kind="a")
    assert begun(300).tuner.drafting, "a was not tried"


def test_a_generation_that_begins_when_others_run_shares() -> None:
    workers = Workers()
    assert workers.knowledge.controller("dsi", 1, None, position=10).estimates.sharers == 1
    workers.running = 4
    assert workers.knowledge.controller("dsi", 1, None, position=10).estimates.sharers == 3


def test_it_plans_by_where_its_workers_compute() -> None:
    workers = Workers()
    target = workers.join("target", 10.0, device="cuda:0")
    beside, apart = (workers.join("drafter", 1.0, kind="a", device=device) for device in ("cuda:0", "cuda:1"))
    assert can_overlap([target], [])
    assert not can_overlap([target], [beside])
    assert can_overlap([target], [apart])


def test_drafters_are_tried_together_where_target_servers_take_trees() -> None:
    workers = Workers()
    for kind in ("a", "b"):
        workers.join("drafter", 20.0, kind=kind)

    def begun() -> str:
        """After each drafter was found to be slower than another one that was not tried yet."""
        controller = workers.knowledge.controller("dsi", 1, None, position=300)
        controller.begin()
        for _ in range(40):
            controller.committed(1, 90.0, 300, drafts=True, drafters=["a", "b"])
        return controller.drafter

    assert [begun(), begun(), begun()] == ["a", "b", "a"], "chains only"
    for worker in workers.of_role("target"):
        assert worker.ready is not None
        worker.ready = replace(worker.ready, rows=16)
    assert begun() == TOGETHER


def test_who_leads_is_listed_first_and_computes() -> None:
    config = Config(target="T", drafter=("ngram", "a", "b"))
    knowledge = Knowledge(config, lambda role: [], lambda: 0)
    kinds = ["unknown", "ngram", "b", "a", "another"]
    assert sorted(kinds, key=knowledge.rank) == ["a", "b", "unknown", "another", "ngram"]


def test_several_together_begin_with_what_is_known_of_the_leader() -> None:
    workers = Workers()
    learnt = Estimates(100.0, 100.0, 8, drafter_ms=3.0, accepted=5.0, judged=10.0)
    workers.knowledge.learn(learnt, "a", 10, 100)
    assert workers.knowledge.guesser(["a", "b"], 10, 7.0).drafter_ms == 3.0
    assert workers.knowledge.guesser(["b", "a"], 10, 7.0).drafter_ms == 7.0
    workers.knowledge.learn(replace(learnt, drafter_ms=4.0), TOGETHER, 10, 100)
    assert workers.knowledge.guesser(["a", "b"], 10, 7.0).drafter_ms == 4.0
    assert workers.knowledge.guesser(["a"], 10, 7.0).drafter_ms == 3.0


def test_a_drafter_for_one_generation_tells_what_rows_cost_too() -> None:
    """Before, this came from a step for several generations, and a drafter for one counted as if its rows cost nothing."""
    workers = Workers()
    drafter = workers.join("drafter", 20.0, kind="b")
    assert drafter.ready is not None
    drafter.ready = replace(drafter.ready, slots=1, batch_latency_us=20_000, window_latency_us=41_000, rows=8)
    assert workers.knowledge.estimates().drafter_row == pytest.approx(0.15)
    drafter.ready = replace(drafter.ready, rows=1)
    assert workers.knowledge.estimates().drafter_row == 0


def test_rows_are_those_that_some_drafter_can_make_and_all_targets_take() -> None:
    workers = Workers()
    targets = workers.of_role("target")
    few, many = workers.join("drafter", 1.0, kind="a"), workers.join("drafter", 1.0, kind="b")
    for worker, rows in (*((target, 16) for target in targets), (few, 1), (many, 32)):
        assert worker.ready is not None
        worker.ready = replace(worker.ready, rows=rows)
    assert rows_of_trees(targets, [few]) == 1
    assert rows_of_trees(targets, [few, many]) == rows_of_trees(targets, []) == 16
    assert rows_of_trees([], [many]) == 32
    assert rows_of_trees([], []) == 1
