"""How probable a given text is, and what happens when the target server that tells it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

import dsi_actors
from dsi_protocol import Cancel, Draft, Failed, FromWorker, Score, Scored, Verify
from support.fake_worker import FakeWorker, running
from support.patience import limit_s
from support.timed import PROMPT, plain_decoding, timed_config

pytestmark = pytest.mark.usefixtures("forked_workers")

TEXT = list(range(10, 22))
EXPECTED = tuple(-float(token) for token in TEXT[1:])


def block(request: Score, start: int, end: int) -> Scored:
    """The log probability of each token is minus its id."""
    end = min(end, len(request.tokens))
    logprobs = tuple(-float(token) for token in request.tokens[start:end])
    return Scored(request.generation, request.attempt, start, logprobs, end == len(request.tokens), 1, 10)


def all_of_it(request: Score) -> Iterable[FromWorker]:
    starts = range(request.start, len(request.tokens), 4)
    return [block(request, start, start + 4) for start in starts]


class Teller(FakeWorker):
    """A target server that answers Score."""

    def __init__(self, tell: Callable[[Score], Iterable[FromWorker]]) -> None:
        def answer(request: Draft | Verify | Score) -> Iterable[FromWorker]:
            return tell(request) if isinstance(request, Score) else ()

        super().__init__("target", answer)

    @property
    def asked(self) -> list[Score]:
        return [message for message in self.heard if isinstance(message, Score)]


async def told(*workers: Teller, text: list[int] = TEXT) -> dsi_actors.TextScores:
    """By an orchestrator with these workers."""
    config = timed_config(listen="tcp://127.0.0.1:*", target_wait_s=0.0)
    async with dsi_actors.Orchestrator(config) as orchestrator, running(orchestrator.endpoint, *workers):
        assert await orchestrator.wait_for_workers(targets=len(workers), drafters=0, timeout_s=limit_s())
        try:
            return await orchestrator.score(text)
        finally:
            assert orchestrator.running == 0


async def test_the_targets_own_text_is_certain() -> None:
    text = [*PROMPT, *plain_decoding(PROMPT, 20)]
    wrong = [*text[:10], (text[10] + 1) % 1000]
    async with dsi_actors.Orchestrator(timed_config(sp=1)) as orchestrator:
        scores = await orchestrator.score(text, top_logprobs=2)
        assert scores.logprobs[len(PROMPT) - 1 :] == (0.0,) * 20
        assert [tops[0] for tops in scores.top_logprobs[len(PROMPT) - 1 :]] == [(token, 0.0) for token in text[3:]]
        assert all(len(tops) == 2 for tops in scores.top_logprobs)
        assert (await orchestrator.score(wrong)).logprobs[-1] < -100
        assert await orchestrator.score(text[:1]) == dsi_actors.TextScores()
        for given, problem in (([], "empty"), ([1000], "outside the target's vocabulary"), ([1] * (1 << 19), "limit")):
            with pytest.raises(dsi_actors.ConfigError, match=problem):
                await orchestrator.score(given)
        with pytest.raises(dsi_actors.ConfigError, match="top_logprobs"):
            await orchestrator.score(text, top_logprobs=21)


async def test_another_server_goes_on_where_the_first_one_failed() -> None:
    def breaks(request: Score) -> Iterable[FromWorker]:
        return [block(request, 1, 6), Failed(request.generation, request.attempt, "engine", "it broke")]

    first, second = Teller(breaks), Teller(breaks)
    # Whichever is asked first breaks; the other one is asked for the rest, and answers.
    for worker, other in ((first, second), (second, first)):
        worker.answer = lambda request, other=other: (  # type: ignore[misc]
            all_of_it(request) if other.asked else breaks(request)
        )
    assert (await told(first, second)).logprobs == EXPECTED
    assert sorted(request.start for request in (*first.asked, *second.asked)) == [1, 6]


async def test_a_lost_block_is_asked_for_again() -> None:
    def loses(request: Score) -> Iterable[FromWorker]:
        blocks = list(all_of_it(request))
        return [blocks[0], blocks[0], *blocks[2:]] if request.start == 1 else blocks

    worker = Teller(loses)
    assert (await told(worker)).logprobs == EXPECTED
    assert [request.start for request in worker.asked] == [1, 5]
    assert any(isinstance(message, Cancel) for message in worker.heard)


@pytest.mark.parametrize(
    "tell",
    [
        lambda request: [block(request, 5, 9)],
        lambda request: [Scored(request.generation, request.attempt, 1, (-1.0,), True, 1, 10)],
        lambda request: [Scored(request.generation, request.attempt, 1, (), False, 1, 10)],
        lambda request: [Scored(request.generation, request.attempt, 1, (-1.0,) * 12, True, 1, 10)],
        lambda request: [Scored(request.generation, request.attempt, 1, (-1.0,) * 11, True, 1, 10, (1,), (-1.0,))],
    ],
    ids=["it always skips", "too few", "none", "too many", "more than was asked for"],
)
async def test_a_server_that_tells_nonsense_is_left(tell: Callable[[Score], Iterable[FromWorker]]) -> None:
    with pytest.raises(dsi_actors.NoTargetError, match="failed"):
        await told(Teller(tell))


async def test_a_target_that_cannot_do_it_says_so() -> None:
    def refuses(request: Score) -> Iterable[FromWorker]:
        return [Failed(request.generation, request.attempt, "request", "this engine cannot")]

    with pytest.raises(dsi_actors.ConfigError, match="cannot tell how probable a text is: this engine cannot"):
        await told(Teller(refuses))
