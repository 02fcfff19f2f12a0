"""A short run of the fuzzer of the service; `make fuzz` runs it for long."""

from __future__ import annotations

from fuzzing import http


def test_no_request_breaks_the_service() -> None:
    done = http.run(150, first_seed=1)
    assert done.texts > 30, "or the fuzzer is no good"
    assert done.outcomes["400"] > 5, "or the fuzzer is no good"
