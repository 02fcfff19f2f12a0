"""The checks, in order. Each is named by the first line of its docstring; each is one promise of SPEC.md."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgpack

from dsi_actors.conformance.peer import Nonconformance, Peer
from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Failed,
    Goodbye,
    Hello,
    NeedPrefix,
    Ready,
    Verified,
    Verify,
    encode,
)

Check = Callable[[Peer], Awaitable[None]]

#: Repeats itself, so that a drafter that looks for repetitions has something to say.
PROMPT = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)
_WINDOW_MS = (100, 5000)
#: A worker that was dismissed may take so long to end.
_LEAVING_S = 10.0
_BAD_FRAMES = (
    b"", b"\xc1", b"\x93\x0b\x03\x09", b"\x81\xa4type\xa6Cancel", b"\x81\xa4type\xcc\xc8", b"\x82\xa4type\x0b\xaageneration\x03",
    b"\x83\xa4type\x0b\xaageneration\xff\xa7attempt\x01", b"\xdd\xff\xff\xff\xff", b"\x81\xa4type" + b"\x91" * 2000,
)  # fmt: skip


async def repeats_hello(peer: Peer) -> None:
    """Hello comes again until it is answered (section 4)"""
    first = await peer.take(Hello, within_s=60.0)
    second = await peer.take(Hello, within_s=3.0, what="Hello")
    if first != second:
        raise Nonconformance("the second Hello differs from the first")
    if first.role not in ("auto", "target", "drafter"):
        raise Nonconformance(f"it wants the role {first.role!r}: auto, target or drafter")


async def becomes_ready(peer: Peer) -> None:
    """Welcome is answered by Ready (section 4)"""
    assert peer.hello is not None
    heartbeat_ms, silence_ms = _WINDOW_MS
    role = peer.hello.role if peer.hello.role != "auto" else "drafter"
    engine = peer.hello.engine if peer.hello.engine != "auto" else "timed"
    peer.welcome(role, engine, peer.hello.model, heartbeat_ms=heartbeat_ms, silence_ms=silence_ms)
    peer.ready = await peer.take(Ready, within_s=300.0)
    if bool(peer.ready.vocabulary) != bool(peer.ready.vocabulary_size):
        raise Nonconformance("vocabulary is empty if and only if vocabulary_size is 0")
    if peer.ready.max_length < 64:
        raise Nonconformance(f"max_length {peer.ready.max_length} leaves no room")
    if role == "target" and peer.ready.window < 1:
        raise Nonconformance("a target server says how many positions one forward holds")


async def beats(peer: Peer) -> None:
    """Heartbeats come every heartbeat_ms, their sequence rises (section 4)"""
    before, interval_s = len(peer.heartbeats), _WINDOW_MS[0] / 1e3
    few = "fewer than 10 heartbeats in the time of 20"
    await peer.until(lambda: len(peer.heartbeats) >= before + 10, 20 * interval_s, few)
    # Counted from the Welcome on: those that waited to be read here did not come too fast.
    due = (time.monotonic() - peer.welcomed_s) / interval_s
    if len(peer.heartbeats) > 5 + 1.5 * due:
        raise Nonconformance(f"{len(peer.heartbeats)} heartbeats in the time of {due:.0f}")
    numbers = [beat.sequence for beat in peer.heartbeats]
    if numbers != sorted(set(numbers)):
        raise Nonconformance("the sequence of heartbeats does not rise")
    if peer.hello is not None and {beat.incarnation for beat in peer.heartbeats} != {peer.hello.incarnation}:
        raise Nonconformance("a heartbeat names another incarnation than Hello")


async def is_ready_again(peer: Peer) -> None:
    """A Welcome that comes again is answered by Ready again (section 4)"""
    assert peer.hello is not None
    role = peer.hello.role if peer.hello.role != "auto" else "drafter"
    peer.welcome(role, peer.hello.engine, peer.hello.model, heartbeat_ms=_WINDOW_MS[0], silence_ms=_WINDOW_MS[1])
    if await peer.take(Ready) != peer.ready:
        raise Nonconformance("the second Ready differs from the first")


async def drops_bad_frames(peer: Peer) -> None:
    """Malformed frames and unknown types are dropped, the connection goes on (section 2)"""
    for frame in _BAD_FRAMES:
        peer.tell_frame(frame)
    await peer.silence(0.3, "bad frames need no answer")
    request = a_request(peer)
    peer.tell(request)
    await peer.terminal(request)


async def ignores_unknown_fields(peer: Peer) -> None:
    """Fields that a later version may add are ignored (section 2)"""
    request = a_request(peer)
    wire = msgpack.unpackb(encode(request))
    wire["more"] = {"nested": [1, 2.5, "text", None]}
    peer.tell_frame(msgpack.packb(wire))
    await peer.terminal(request)


async def knows_no_closed_generation(peer: Peer) -> None:
    """A generation that is not open, or closed, is unknown_generation (section 4)"""
    generation = peer.open(len(PROMPT))
    peer.tell(CloseGeneration(generation))
    for number in (generation, 1 << 50):
        request = a_request(peer, number)
        peer.tell(request)
        failed = await peer.reply(Failed, request)
        if failed.code != "unknown_generation":
            raise Nonconformance(f"it failed with {failed.code!r} instead of unknown_generation")


async def needs_a_prefix_it_does_not_hold(peer: Peer) -> None:
    """A prefix that is too short or another text is answered by NeedPrefix (section 4)"""
    generation = peer.open(len(PROMPT))
    too_far = a_request(peer, generation, held=PROMPT)
    peer.tell(too_far)
    if (await peer.reply(NeedPrefix, too_far)).held != 0:
        raise Nonconformance("it holds nothing, and says that it holds something")
    first = a_request(peer, generation)
    peer.tell(first)
    await peer.terminal(first)
    other_text = a_request(peer, generation, held=(*PROMPT[:-1], 9), tokens=())
    peer.tell(other_text)
    if (await peer.reply(NeedPrefix, other_text)).held != 0:
        raise Nonconformance("it holds another text, and says from where to send again: all of it must be sent")


async def answers_what_comes_twice_once(peer: Peer) -> None:
    """A request that comes again after its terminal reply gets the same again (section 4)"""
    request = a_request(peer)
    peer.tell(request)
    first = await peer.terminal(request)
    peer.tell(request)
    if await peer.terminal(request) != first:
        raise Nonconformance("the second reply differs from the first")


async def takes_a_cancel_before_its_request(peer: Peer) -> None:
    """A cancel is a cut: it may come first, twice, and covers earlier attempts (section 4)"""
    generation = peer.open(len(PROMPT))
    first, second = a_request(peer, generation), a_request(peer, generation)
    peer.tell(Cancel(generation, second.attempt))
    peer.tell(Cancel(generation, second.attempt))
    for request in (first, second):
        peer.tell(request)
        await peer.reply(Cancelled, request)
    third = a_request(peer, generation)
    peer.tell(third)
    if isinstance(await peer.terminal(third), Cancelled):
        raise Nonconformance("a later attempt was cancelled, too")


async def ends_what_is_cancelled(peer: Peer) -> None:
    """A request that is cancelled while it runs has its one terminal reply soon (section 4)"""
    for _ in range(5):
        request = a_request(peer, count=30)
        peer.tell(request)
        peer.tell(Cancel(request.generation, request.attempt))
        await peer.terminal(request)
    await peer.silence(0.2, "there is one terminal reply")


async def refuses_what_is_out_of_range(peer: Peer) -> None:
    """Positions beyond max_length, and starts and counts that make no sense, are Failed, code limit (section 4)"""
    assert peer.ready is not None
    generation = peer.open(len(PROMPT))
    bad: list[Draft | Verify]
    if is_drafter(peer):
        bad = [
            peer.draft(generation, PROMPT, 0, 1), peer.draft(generation, PROMPT, 1, 0),
            peer.draft(generation, PROMPT, 1, 1, start=len(PROMPT) - 1),
            peer.draft(generation, PROMPT, peer.ready.max_length, 1),
        ]  # fmt: skip
    else:
        bad = [peer.verify(generation, PROMPT, 0), peer.verify(generation, PROMPT, len(PROMPT) + 1)]
        if peer.ready.vocabulary_size:
            bad.append(peer.verify(generation, (*PROMPT, peer.ready.vocabulary_size), 3))
    for request in bad:
        peer.tell(request)
        failed = await peer.reply(Failed, request)
        if failed.code != "limit":
            raise Nonconformance(f"it failed with {failed.code!r} instead of limit: {request}")


async def forgets_idle_generations_only(peer: Peer) -> None:
    """It holds 256 generations, and makes room for more (section 4)"""
    opened = [peer.open(len(PROMPT)) for _ in range(256)]
    for generation in (opened[0], opened[-1], None):  # None: one more
        request = a_request(peer, generation)
        peer.tell(request)
        if isinstance(reply := await peer.terminal(request), Failed):
            raise Nonconformance(f"a generation was not served: {reply.message}")


async def drafts_in_blocks(peer: Peer) -> None:
    """Guesses come in blocks, in order, no more than asked for (section 4)"""
    for count, block in ((6, 1), (6, 4), (5, 100)):
        request = peer.draft(peer.open(len(PROMPT)), PROMPT, count, block)
        peer.tell(request)
        await peer.drafted(request)


async def drafts_on(peer: Peer) -> None:
    """A draft may continue the worker's own guesses, and begin again behind a correction (section 4)"""
    generation = peer.open(len(PROMPT))
    first = peer.draft(generation, PROMPT, 4, 2)
    peer.tell(first)
    guesses = await peer.drafted(first)
    more = peer.draft(generation, (), 3, 3, held=PROMPT, start=len(PROMPT) + len(guesses))
    peer.tell(more)
    await peer.drafted(more)
    corrected = peer.draft(generation, (4, 1, 2), 4, 4, held=PROMPT)
    peer.tell(corrected)
    await peer.drafted(corrected)
    held = peer.draft(generation, (), 1, 1, held=(*PROMPT, 4, 1, 2))
    peer.tell(held)
    await peer.drafted(held)


async def verifies_the_same_however_it_is_asked(peer: Peer) -> None:
    """The target's tokens do not depend on the guesses, nor on how they are grouped (section 4)"""
    truth: tuple[int, ...] = ()
    generation = peer.open(len(PROMPT))
    for position in range(4):
        tokens = (PROMPT + truth)[max(0, len(PROMPT) + position - 1) :] if position else PROMPT
        held = (PROMPT + truth)[: -len(tokens)] if position else ()
        request = peer.verify(generation, tokens, len(PROMPT) + position, held=held)
        peer.tell(request)
        truth += (await peer.reply(Verified, request)).tokens
    if len(truth) != 4:
        raise Nonconformance("a verification without guesses has one token")
    assert peer.ready is not None
    wrong = (truth[1] + 1) % max(2, peer.ready.vocabulary_size)
    for guesses, expected in (((), truth[:1]), (truth[:3], truth[:4]), ((truth[0], wrong, truth[2]), truth[:2])):
        request = peer.verify(peer.open(len(PROMPT)), PROMPT + guesses, len(PROMPT))
        peer.tell(request)
        got = await peer.reply(Verified, request)
        if (got.start, got.tokens) != (len(PROMPT), expected):
            raise Nonconformance(f"guesses {guesses} gave {got.tokens}, one at a time they are {expected}")


async def gives_logprobs_when_asked(peer: Peer) -> None:
    """A generation with logprobs has one for each token, others none (section 4)"""
    for wanted in (True, False):
        request = peer.verify(peer.open(len(PROMPT), logprobs=wanted), PROMPT, len(PROMPT))
        peer.tell(request)
        reply = await peer.reply(Verified, request)
        if len(reply.logprobs) != (len(reply.tokens) if wanted else 0) or any(value > 1e-6 for value in reply.logprobs):
            raise Nonconformance(
                f"{len(reply.logprobs)} log probabilities for {len(reply.tokens)} tokens: {reply.logprobs}"
            )


async def samples_by_the_seed(peer: Peer) -> None:
    """Sampled tokens depend on the seed and nothing else (section 7)"""
    answers: list[tuple[int, ...]] = []
    for _ in range(2):
        request = peer.verify(peer.open(len(PROMPT), temperature=1.0, seed=5), PROMPT, len(PROMPT))
        peer.tell(request)
        answers.append((await peer.reply(Verified, request)).tokens)
    if answers[0] != answers[1]:
        raise Nonconformance(f"the same seed gave {answers[0]} and {answers[1]}")


async def ends_when_dismissed(peer: Peer) -> None:
    """Goodbye without `again`: the worker ends (section 4)"""
    peer.tell(Goodbye("the examination is over"))
    await peer.until(peer.has_left, _LEAVING_S, f"it is still connected {_LEAVING_S:g} s after Goodbye")


def is_drafter(peer: Peer) -> bool:
    return peer.hello is not None and peer.hello.role != "target"


def a_request(
    peer: Peer, generation: int | None = None, *, held: tuple[int, ...] = (), tokens: tuple[int, ...] | None = None,
    count: int = 3,
) -> Draft | Verify:  # fmt: skip
    """The simplest request that this worker serves, not sent yet."""
    number = peer.open(len(PROMPT)) if generation is None else generation
    new = tokens if tokens is not None else (PROMPT if not held else (3,))
    if is_drafter(peer):
        return peer.draft(number, new, count, 1, held=held)
    return peer.verify(number, new, len(held) + len(new), held=held)


JOINING: tuple[Check, ...] = (repeats_hello, becomes_ready)
COMMON: tuple[Check, ...] = (
    beats, is_ready_again, drops_bad_frames, ignores_unknown_fields, knows_no_closed_generation,
    needs_a_prefix_it_does_not_hold, answers_what_comes_twice_once, takes_a_cancel_before_its_request,
    ends_what_is_cancelled, refuses_what_is_out_of_range, forgets_idle_generations_only,
)  # fmt: skip
DRAFTER: tuple[Check, ...] = (drafts_in_blocks, drafts_on)
TARGET: tuple[Check, ...] = (
    verifies_the_same_however_it_is_asked, gives_logprobs_when_asked, samples_by_the_seed,
)  # fmt: skip
LEAVING: tuple[Check, ...] = (ends_when_dismissed,)
