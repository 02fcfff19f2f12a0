"""Short runs of the fuzzers; `make fuzz` runs them for long."""

from __future__ import annotations

import pytest

from fuzzing import codec, orchestrator


def test_no_frame_breaks_the_codec() -> None:
    outcomes = codec.run(40_000, seed=1)
    assert outcomes["understood"] > 4_000, "or the fuzzer is no good"


@pytest.mark.parametrize("frame", codec.big_frames())
def test_a_big_frame_takes_no_more_memory_than_it_deserves(frame: bytes) -> None:
    codec.check_memory(frame)


async def test_no_worker_breaks_the_orchestrator() -> None:
    assert await orchestrator.run(15, seed=1) > 75, "some had to be replaced"
