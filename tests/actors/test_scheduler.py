"""Who gets which worker: in order, no worker twice, none kept by the dead."""

from __future__ import annotations

from dsi_actors.actors.scheduler import GivenBack, Released, Requested, Scheduler, WorkerGone, WorkerReady
from dsi_actors.actors.worker_handle import WorkerHandle
from dsi_protocol import Hello


def worker(number: int, role: str) -> WorkerHandle:
    hello = Hello(1, number, role, "timed", "", "cpu:0", "host", number)
    return WorkerHandle(number, bytes([number]), hello, role, lambda message: None)


class Client:
    def __init__(self, number: int) -> None:
        self.number = number
        self.workers: list[int] = []

    def grant(self, worker: WorkerHandle) -> None:
        assert worker.number not in self.workers
        self.workers.append(worker.number)

    def withdraw(self, worker: WorkerHandle) -> None:
        self.workers.remove(worker.number)

    def reclaim(self, worker: WorkerHandle) -> None:
        self.workers.remove(worker.number)


T1, T2, T3, D9 = worker(1, "target"), worker(2, "target"), worker(3, "target"), worker(9, "drafter")


def test_first_come_first_served_and_the_rest_moves_up() -> None:
    scheduler, first, second = Scheduler(), Client(1), Client(2)
    for ready in (T1, T2, T3, D9):
        scheduler.receive(WorkerReady(ready))
    scheduler.receive(Requested(first, 2, wants_drafter=True))
    scheduler.receive(Requested(second, 2, wants_drafter=True))
    assert first.workers == [9, 1, 2]
    assert second.workers == [3]
    scheduler.receive(Released(first))
    assert second.workers == [3, 9, 1]


def test_each_has_one_server_before_any_has_two() -> None:
    scheduler, first, second, third, fourth = Scheduler(), Client(1), Client(2), Client(3), Client(4)
    for ready in (T1, T2, T3):
        scheduler.receive(WorkerReady(ready))
    scheduler.receive(Requested(first, 3, wants_drafter=False))
    assert first.workers == [1, 2, 3]
    scheduler.receive(Requested(second, 3, wants_drafter=False))
    assert (first.workers, second.workers) == ([1, 2], [3])
    scheduler.receive(Requested(third, 3, wants_drafter=False))
    assert (first.workers, second.workers, third.workers) == ([1], [3], [2])
    scheduler.receive(Requested(fourth, 3, wants_drafter=False))
    assert fourth.workers == []
    assert scheduler.waiting == 1
    scheduler.receive(Released(second))
    assert fourth.workers == [3]
    scheduler.receive(Released(first))
    scheduler.receive(Released(fourth))
    assert third.workers == [2, 1, 3]


def test_workers_that_come_late_are_used_at_once() -> None:
    scheduler, client = Scheduler(), Client(1)
    scheduler.receive(Requested(client, 2, wants_drafter=False))
    for ready in (T1, D9, T2, T3):
        scheduler.receive(WorkerReady(ready))
    assert client.workers == [1, 2]


def test_a_worker_that_is_gone_is_withdrawn_and_replaced() -> None:
    scheduler, client = Scheduler(), Client(1)
    for ready in (T1, T2, T3):
        scheduler.receive(WorkerReady(ready))
    scheduler.receive(Requested(client, 2, wants_drafter=True))
    scheduler.receive(WorkerGone(T1))
    assert client.workers == [2, 3]
    scheduler.receive(WorkerGone(T3))
    assert client.workers == [2]


def test_a_worker_that_failed_a_generation_goes_to_others() -> None:
    scheduler, first, second = Scheduler(), Client(1), Client(2)
    for ready in (T1, T2):
        scheduler.receive(WorkerReady(ready))
    scheduler.receive(Requested(first, 1, wants_drafter=False))
    first.workers.remove(1)
    scheduler.receive(GivenBack(first, T1))
    assert first.workers == [2]
    scheduler.receive(Requested(second, 2, wants_drafter=False))
    assert second.workers == [1]
