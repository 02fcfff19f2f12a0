"""Strangers are heard at a modest rate; workers always."""

from __future__ import annotations

from dsi_actors.transport.doorkeeper import Doorkeeper, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(3, 2.0, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(0.5), bucket.take(0.5)] == [True, False]
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False], "no more than a burst is saved up"


def test_a_flood_is_dropped_unread_and_others_are_heard() -> None:
    clock = Clock()
    floods: list[bytes] = []
    door = Doorkeeper(clock, floods.append)
    door.trust(b"worker")
    heard = sum(door.lets_in(b"flooder", 100) for _ in range(10_000))
    assert heard == 200
    assert door.turned_away == 9_800
    assert door.lets_in(b"somebody else", 100)
    assert all(door.lets_in(b"worker", 1 << 20) for _ in range(10_000))
    assert floods == []
    clock.now_s += 1.0
    assert sum(door.lets_in(b"flooder", 100) for _ in range(10_000)) == 200


def test_a_worker_that_floods_is_told_on_and_forgotten() -> None:
    floods: list[bytes] = []
    door = Doorkeeper(Clock(), floods.append)
    door.trust(b"worker")
    assert sum(door.lets_in(b"worker", 100) for _ in range(10_001)) == 10_000
    assert floods == [b"worker"]
    door.forget(b"worker")
    assert not door.lets_in(b"worker", 100_000), "a stranger again"


def test_a_stranger_sends_no_long_frames() -> None:
    assert not Doorkeeper(Clock(), lambda identity: None).lets_in(b"stranger", 100_000)


def test_strangers_without_number_take_no_memory() -> None:
    door = Doorkeeper(Clock(), lambda identity: None)
    for number in range(20_000):
        door.lets_in(number.to_bytes(8, "big"), 10)
    assert len(door._strangers) == 4096
