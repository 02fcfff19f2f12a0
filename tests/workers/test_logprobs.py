"""Log probabilities are those of the model: a plain softmax of its logits, whatever is asked, guessed or cached."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dsi_protocol import (
    MAX_REPLY_FRAME_BYTES,
    MAX_TOLD,
    Cancel,
    Cancelled,
    Failed,
    FromWorker,
    Message,
    OpenGeneration,
    SamplingParameters,
    Score,
    Scored,
    Verified,
    Verify,
    encode,
    prefix_checksum,
)
from dsi_workers.connection import WorkSocket
from dsi_workers.engines import Engine, load_engine
from dsi_workers.loop import WorkerLoop
from dsi_workers.sampling import log_probabilities, most_probable
from dsi_workers.session import Session
from support.engines import NoInterrupt, ScriptedSocket, make_tiny_model

PROMPT = [token * 7 % 90 for token in range(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def target(model: Path) -> Engine:
    options: dict[str, Any] = {"max_length": 512, "slots": 2, "dtype": "float32", "calibrate": False}
    return load_engine("transformers", role="target", model=str(model), device="cpu:0", options=options)


def replies(engine: Engine, *messages: Message) -> list[FromWorker]:
    """What a worker says that gets these messages. Then it forgets its generations."""
    socket = ScriptedSocket()
    socket.inbox.extend(messages)
    loop = WorkerLoop(cast(WorkSocket, socket), engine, still_needed=lambda: True, role="target")
    loop.run()
    loop.forget_all()
    return socket.sent


def answered(engine: Engine, *messages: Message) -> list[Verified]:
    """The same, of messages that bring nothing but Verified."""
    found = replies(engine, *messages)
    assert all(isinstance(reply, Verified) for reply in found), found
    return [reply for reply in found if isinstance(reply, Verified)]


def scored(
    engine: Engine, tokens: list[int], start: int = 1, *, top: int = 2, prompt_length: int | None = None
) -> list[Scored]:
    """What a worker tells of these tokens."""
    sampling = SamplingParameters(logprobs=True, top_logprobs=top)
    opened = OpenGeneration(1, len(tokens) if prompt_length is None else prompt_length, "", sampling)
    found = replies(engine, opened, Score(1, 1, 0, 0, tuple(tokens), start))
    blocks = [reply for reply in found if isinstance(reply, Scored)]
    assert len(found) == len(blocks)
    assert [block.done for block in blocks] == [False] * (len(blocks) - 1) + [True]
    for block, following in pairwise(blocks):
        assert block.start + len(block.logprobs) == following.start
    assert blocks[0].start == start
    assert blocks[-1].start + len(blocks[-1].logprobs) == len(tokens)
    return blocks


def told(blocks: list[Scored]) -> tuple[list[float], list[tuple[int, float]]]:
    logprobs = [logprob for block in blocks for logprob in block.logprobs]
    tops = [pair for block in blocks for pair in zip(block.top_tokens, block.top_logprobs, strict=True)]
    return logprobs, tops


def reference(model: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities of every token after each of these, by transformers and torch alone."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.inference_mode():
        found: torch.Tensor = made(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_most_probable_tokens_are_those_of_a_plain_softmax(target: Engine, model: Path, temperature: float) -> None:
    sampling = SamplingParameters(temperature, repetition_penalty=1.3, seed=4, logprobs=True, top_logprobs=5)
    session = Session(1, 40, "", sampling)
    session.write(0, PROMPT[:40])
    tokens, logprobs, tops = list[int](), list[float](), list[tuple[int, float]]()
    for _ in range(12):
        answer = target.verify(session, len(session.tokens), NoInterrupt())
        session.write(len(session.tokens), answer.tokens)
        tokens += answer.tokens
        logprobs += answer.logprobs
        tops += zip(answer.top_tokens, answer.top_logprobs, strict=True)
    target.forget(session)
    expected = reference(model, PROMPT[:40] + tokens)[39:-1]
    assert logprobs == pytest.approx([float(row[token]) for row, token in zip(expected, tokens, strict=True)], abs=1e-4)
    values, places = expected.topk(5)
    assert [token for token, _ in tops] == places.flatten().tolist()
    assert [logprob for _, logprob in tops] == pytest.approx(values.flatten().tolist(), abs=1e-4)


def test_among_equals_the_smallest_ids_come_first() -> None:
    logprobs = log_probabilities(torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0]))
    tokens, values = most_probable(logprobs, 4)
    assert tokens == [1, 3, 2, 4]
    assert values == logprobs[tokens].tolist()
    assert most_probable(logprobs, 20)[0] == [1, 3, 2, 4, 5, 0]
    assert all(abs(value) < 1e39 for value in log_probabilities(torch.full((3,), torch.nan)).tolist())


def test_a_long_answer_is_cut_so_that_it_fits_its_frame() -> None:
    """The timed engine says the same however it is asked: all guesses are right."""
    timed = load_engine("timed", role="target", model="", device="cpu:0", options={})
    session = Session(1, 3, "", SamplingParameters())
    session.write(0, [1, 2, 3])
    for _ in range(MAX_TOLD + 100):
        session.write(len(session.tokens), timed.verify(session, len(session.tokens), NoInterrupt()).tokens)
    opened = OpenGeneration(1, 3, "", SamplingParameters(logprobs=True, top_logprobs=20))
    [reply] = answered(timed, opened, Verify(1, 1, 0, 0, tuple(session.tokens), 3, ahead=8))
    assert reply.tokens == tuple(session.tokens[3 : 3 + MAX_TOLD])
    assert len(reply.logprobs) == MAX_TOLD
    assert len(reply.top_tokens) == len(reply.top_logprobs) == 20 * MAX_TOLD
    assert not reply.more
    assert len(encode(reply)) < MAX_REPLY_FRAME_BYTES


def test_the_first_answer_tells_how_much_of_the_prompt_was_there(target: Engine) -> None:
    again = Verify(1, 2, 300, prefix_checksum(PROMPT), (), 300)
    cached = []
    for prompt in (PROMPT, PROMPT, PROMPT[:256], PROMPT[:100]):
        asked: list[Message] = [
            OpenGeneration(1, len(prompt), ""),
            Verify(1, 1, 0, 0, tuple(prompt), len(prompt)),
            *([again] if prompt is PROMPT else []),
        ]
        cached.append([reply.cached for reply in answered(target, *asked)])
    # Two whole blocks; of a prompt that ends with a block this is read again, for the logits behind it.
    assert cached == [[0, 0], [256, 0], [128], [0]]


def test_a_given_text_is_as_probable_as_a_plain_softmax_says(target: Engine, model: Path) -> None:
    """Read in chunks, which tell a block each. Where the prompt ends makes no difference but rounding."""
    expected = reference(model, PROMPT)[:-1]
    given = [float(row[token]) for row, token in zip(expected, PROMPT[1:], strict=True)]
    values, places = expected.topk(2)
    blocks = scored(target, PROMPT)
    assert [block.start for block in blocks] == [1, 129, 257]
    for prompt_length in (300, 140, 1):
        logprobs, tops = told(scored(target, PROMPT, prompt_length=prompt_length))
        assert logprobs == pytest.approx(given, abs=1e-4)
        assert [token for token, _ in tops] == places.flatten().tolist()
        assert [logprob for _, logprob in tops] == pytest.approx(values.flatten().tolist(), abs=1e-4)


def test_a_score_depends_on_the_text_alone(target: Engine) -> None:
    """Neither on where it starts, nor on what the worker had computed before, nor on who else is served."""
    logprobs, tops = told(scored(target, PROMPT))
    for start in (2, 128, 129, 200, 299):
        later, later_tops = told(scored(target, PROMPT, start))
        assert later == logprobs[start - 1 :]
        assert later_tops == tops[2 * (start - 1) :]
    opened = OpenGeneration(1, 300, "", SamplingParameters(logprobs=True, top_logprobs=2))
    other = OpenGeneration(2, 5, "", SamplingParameters(0.8, seed=3))
    found = replies(
        target, opened, other, Verify(1, 1, 0, 0, tuple(PROMPT), 300), Score(1, 2, 0, 0, tuple(PROMPT), 1),
        Verify(1, 3, 300, prefix_checksum(PROMPT), (), 300), Verify(2, 1, 0, 0, (1, 2, 3, 4, 5), 5, ahead=6),
    )  # fmt: skip
    first, second = (reply for reply in found if isinstance(reply, Verified) and reply.generation == 1)
    assert first.tokens == second.tokens
    assert first.logprobs == second.logprobs
    assert told([reply for reply in found if isinstance(reply, Scored)]) == (logprobs, tops)


def test_blocks_of_a_score_fit_their_frames() -> None:
    """Also of an engine that reads all at once."""
    timed = load_engine("timed", role="target", model="", device="cpu:0", options={})
    blocks = scored(timed, [7] * (2 * MAX_TOLD + 10), top=20)
    assert [len(block.logprobs) for block in blocks] == [MAX_TOLD, MAX_TOLD, 9]
    assert all(len(encode(block)) < MAX_REPLY_FRAME_BYTES for block in blocks)


def test_a_cancelled_score_ends(target: Engine) -> None:
    opened = OpenGeneration(1, 300, "", SamplingParameters(logprobs=True))
    assert replies(target, opened, Score(1, 1, 0, 0, tuple(PROMPT), 1), Cancel(1, 1)) == [Cancelled(1, 1, 0, 0)]


@pytest.mark.parametrize("start", [0, 300])
def test_a_score_of_nothing_is_refused(target: Engine, start: int) -> None:
    opened = OpenGeneration(1, 300, "", SamplingParameters(logprobs=True))
    [reply] = replies(target, opened, Score(1, 1, 0, 0, tuple(PROMPT), start))
    assert isinstance(reply, Failed)
    assert reply.code == "limit"
