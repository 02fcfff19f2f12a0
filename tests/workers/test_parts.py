"""A prompt in several threads: which rows each computes, in which order they read what others store, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some

from dsi_workers.decoding.cpu.parts import PartThreads, parts_of
from dsi_workers.decoding.packed import PackedBatch, Segment

LAYERS = 20


def packed(*segments: Segment, rows: int | None = None, per_position: bool = False) -> PackedBatch:
    used = range(sum(segment.width for segment in segments))
    ids = [0] * (len(used) if rows is None else rows)
    return PackedBatch(ids, ids, segments, [-1], used, per_position)


@given(width=some.integers(1, 300), position=some.integers(0, 1000), most=some.integers(1, 9))
def test_parts_are_the_rows_in_order_and_about_as_many_in_each(width: int, position: int, most: int) -> None:
    parts = parts_of(packed(Segment(3, position, width, position + width)), most)
    assert 1 <= len(parts) <= most
    assert [row for part in parts for row in range(part.rows.start, part.rows.stop)] == list(range(width))
    for rows, segment in parts:
        size = rows.stop - rows.start
        assert (segment.slot, segment.position, segment.width) == (3, position + rows.start, size)
        assert segment.readable == segment.position + size
        assert size >= min(8, width)
        assert abs(size - width / len(parts)) < 8


def test_what_is_no_single_run_of_positions_is_not_divided() -> None:
    run = Segment(0, 0, 64, 64)
    assert parts_of(packed(run, Segment(1, 0, 64, 64)), 2) == []
    assert parts_of(packed(Segment(0, 0, 64, 64, fork=0)), 2) == []
    assert parts_of(packed(run, rows=65), 2) == []
    assert parts_of(packed(run, per_position=True), 2) == []


@pytest.mark.parametrize("parts", [2, 5])
def test_a_part_reads_a_layer_once_the_part_before_it_has_stored_it(parts: int) -> None:
    stored, threads, lock = [0] * parts, set[int](), threading.Lock()

    def compute(number: int, may_read: Callable[[], bool], has_stored: Callable[[], None]) -> None:
        threads.add(threading.get_ident())
        for layer in range(LAYERS):
            assert may_read()
            with lock:
                assert number == 0 or stored[number - 1] > layer
                stored[number] = layer + 1
            has_stored()

    PartThreads(parts).compute(parts, compute, lambda: None)
    assert stored == [LAYERS] * parts
    assert len(threads) == parts


class _Cancelled(Exception):
    pass


def test_a_cancel_ends_all_parts_in_the_same_layer() -> None:
    layers, calls = [0, 0, 0], 0

    def between_layers() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise _Cancelled

    def compute(number: int, may_read: Callable[[], bool], has_stored: Callable[[], None]) -> None:
        while may_read():
            layers[number] += 1
            has_stored()

    threads = PartThreads(3)
    with pytest.raises(_Cancelled):
        threads.compute(3, compute, between_layers)
    assert layers == [3, 3, 3], "when it is raised here nobody computes any more"
    calls = 4
    threads.compute(3, lambda number, may_read, has_stored: None, between_layers)


def test_where_no_thread_can_be_started_the_next_pass_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def compute(number: int, may_read: Callable[[], bool], has_stored: Callable[[], None]) -> None:
        computed.append(number)
        may_read()
        has_stored()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = PartThreads(2)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            threads.compute(2, compute, lambda: None)
    assert computed == []
    threads.compute(2, compute, lambda: None)
    assert sorted(computed) == [0, 1]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_a_part_is_raised_and_leaves_none_waiting(failing: int) -> None:
    def compute(number: int, may_read: Callable[[], bool], has_stored: Callable[[], None]) -> None:
        for layer in range(LAYERS):
            if not may_read():
                return
            if number == failing and layer == 3:
                raise ArithmeticError("wrong")
            has_stored()

    with pytest.raises(ArithmeticError, match="wrong"):
        PartThreads(3).compute(3, compute, lambda: None)
