"""Who gets which worker: in order, no worker twice, none kept by the dead."""

from __future__ import annotations

from dsi_actors.workforce.scheduler import Exchanged, GivenBack, Released, Requested, Scheduler, WorkerGone, WorkerReady
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Hello, Ready


def worker(number: int, role: str, slots: int = 1, kind: str = "") -> WorkerHandle:
    hello = Hello(1, number, role, "timed", "", "cpu:0", "host", number)
    made = WorkerHandle(number, bytes([number]), hello, role, lambda message: None, kind=kind)
    made.ready = Ready("", 1000, 1 << 16, 8, 1000, 1000, slots, 0, 1, 0)
    return made


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


def asked(scheduler: Scheduler, *clients: Client, servers: int = 2) -> None:
    for client in clients:
        scheduler.receive(Requested(client, servers, wants_drafter=True))


def test_who_comes_when_every_server_has_one_shares_the_emptiest() -> None:
    scheduler, clients = Scheduler(), [Client(number) for number in range(1, 8)]
    for ready in (worker(1, "target", 3), worker(2, "target", 3), worker(9, "drafter", 5)):
        scheduler.receive(WorkerReady(ready))
    asked(scheduler, *clients)
    servers = [[number for number in client.workers if number != 9] for client in clients]
    assert servers == [[1], [2], [1], [2], [1], [2], []]  # three slots each
    assert scheduler.waiting == 1
    assert [9 in client.workers for client in clients] == [True] * 5 + [False] * 2
    scheduler.receive(Released(clients[1]))
    assert clients[6].workers == [2]
    assert 9 in clients[5].workers


def test_a_server_that_becomes_idle_goes_to_the_crowd() -> None:
    scheduler, clients = Scheduler(), [Client(number) for number in (1, 2, 3, 4)]
    for ready in (worker(1, "target", 4), worker(2, "target", 4)):
        scheduler.receive(WorkerReady(ready))
    asked(scheduler, *clients)
    assert [client.workers for client in clients] == [[1], [2], [1], [2]]
    scheduler.receive(Released(clients[0]))
    scheduler.receive(Released(clients[2]))
    assert [clients[1].workers, clients[3].workers] == [[1], [2]]
    fifth = Client(5)
    scheduler.receive(Requested(fifth, 2, wants_drafter=False))
    assert [client.workers for client in (fifth, clients[1], clients[3])] == [[1], [1], [2]]


def test_who_may_have_one_server_only_moves_to_the_idle_one() -> None:
    scheduler, clients = Scheduler(), [Client(number) for number in (1, 2, 3)]
    for ready in (worker(1, "target", 4), worker(2, "target", 4)):
        scheduler.receive(WorkerReady(ready))
    asked(scheduler, *clients, servers=1)
    assert [client.workers for client in clients] == [[1], [2], [1]]
    scheduler.receive(Released(clients[1]))
    assert [clients[0].workers, clients[2].workers] == [[2], [1]]


def test_a_shared_worker_that_is_gone_is_withdrawn_from_all() -> None:
    scheduler, clients = Scheduler(), [Client(number) for number in (1, 2, 3)]
    first = worker(1, "target", 4)
    scheduler.receive(WorkerReady(first))
    asked(scheduler, *clients)
    scheduler.receive(WorkerGone(first))
    assert [client.workers for client in clients] == [[], [], []]
    scheduler.receive(WorkerReady(worker(2, "target", 2)))
    assert [client.workers for client in clients] == [[2], [2], []]


def test_drafters_of_several_kinds_are_exchanged() -> None:
    scheduler, first, second = Scheduler(), Client(1), Client(2)
    a, b, also_b = (worker(number, "drafter", kind=kind) for number, kind in ((7, "a"), (8, "b"), (9, "b")))
    for ready in (T1, a, b):
        scheduler.receive(WorkerReady(ready))
    assert scheduler.drafter_kinds(first) == ["a", "b"]
    scheduler.receive(Requested(first, 1, wants_drafter=True, kinds=("b",)))
    assert first.workers == [8, 1]
    scheduler.receive(Requested(second, 1, wants_drafter=True, kinds=("b",)))
    assert second.workers == [7], "one of another kind is better than none"
    scheduler.receive(Exchanged(second, ("b",)))
    assert second.workers == [7], "there is none to be had"
    scheduler.receive(WorkerReady(also_b))
    scheduler.receive(Exchanged(second, ("b",)))
    assert second.workers == [9]
    scheduler.receive(Exchanged(second, ("b",)))
    assert second.workers == [9]
    scheduler.receive(Exchanged(first, ("a",)))
    assert first.workers == [1, 7]
    scheduler.receive(Exchanged(Client(3), ("a",)))
    scheduler.receive(WorkerGone(a))
    assert first.workers == [1, 8], "the kind that is left"


def test_drafters_of_all_kinds_may_be_had_at_the_same_time() -> None:
    scheduler, client, other = Scheduler(), Client(1), Client(2)
    a, b, also_b = (worker(number, "drafter", kind=kind) for number, kind in ((7, "a"), (8, "b"), (9, "b")))
    for ready in (T1, a, b):
        scheduler.receive(WorkerReady(ready))
    scheduler.receive(Requested(client, 1, wants_drafter=True, kinds=("b",)))
    assert client.workers == [8, 1]
    scheduler.receive(Exchanged(client, ("a", "b")))
    assert client.workers == [8, 1, 7], "the one that it has stays"
    scheduler.receive(WorkerGone(b))
    assert client.workers == [1, 7]
    scheduler.receive(WorkerReady(also_b))
    assert client.workers == [1, 7, 9], "another one of the kind that it lacks"
    scheduler.receive(Requested(other, 1, wants_drafter=True, kinds=("a", "b")))
    assert other.workers == [], "all are taken"
    scheduler.receive(Exchanged(client, ("a",)))
    assert client.workers == [1, 7]
    assert other.workers == [9]
    client.workers.remove(7)
    scheduler.receive(GivenBack(client, a))
    assert client.workers == [1], "what failed it is not lent to it again"
    assert other.workers == [9, 7]
