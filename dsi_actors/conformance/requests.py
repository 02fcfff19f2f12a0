"""Checks of requests and replies that hold for drafters and target servers alike."""

from __future__ import annotations

import msgpack

from dsi_actors.conformance.differences import Nonconformance, require, require_same
from dsi_actors.conformance.peer import PROMPT, Peer
from dsi_protocol import (
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Failed,
    NeedPrefix,
    Verify,
    encode,
)

_BAD_FRAMES = (
    b"", b"\xc1", b"\x93\x0b\x03\x09", b"\x81\xa4type\xa6Cancel", b"\x81\xa4type\xcc\xc8", b"\x82\xa4type\x0b\xaageneration\x03",
    b"\x83\xa4type\x0b\xaageneration\xff\xa7attempt\x01", b"\xdd\xff\xff\xff\xff", b"\x81\xa4type" + b"\x91" * 2000,
)  # fmt: skip


async def drops_bad_frames(peer: Peer) -> None:
    """Malformed frames and unknown types are dropped, and the connection goes on (section 3)"""
    for frame in _BAD_FRAMES:
        peer.tell_frame(frame)
    await peer.silence(0.3, "a bad frame has no answer")
    request = peer.request()
    peer.tell(request)
    await peer.terminal(request)


async def ignores_unknown_fields(peer: Peer) -> None:
    """Unknown fields, which a later version may add, are ignored (section 3)"""
    request = peer.request()
    wire = msgpack.unpackb(encode(request))
    wire["more"] = {"nested": [1, 2.5, "text", None]}
    peer.tell_frame(msgpack.packb(wire))
    await peer.terminal(request)


async def knows_no_closed_generation(peer: Peer) -> None:
    """A request for a generation that is not open is answered by Failed, code unknown_generation (section 5.7)"""
    generation = peer.open()
    peer.tell(CloseGeneration(generation))
    for number in (generation, 1 << 50):
        request = peer.request(number)
        peer.tell(request)
        await _refused(peer, request, "the generation is not open", "unknown_generation")


async def ends_what_is_closed(peer: Peer) -> None:
    """CloseGeneration: a request in hand still has its one terminal reply, its result or Cancelled (section 5.7)"""
    for _ in range(5):
        request = peer.request(count=30)
        peer.tell(request)
        peer.tell(CloseGeneration(request.generation))
        reply = await peer.terminal(request)
        if isinstance(reply, Failed | NeedPrefix):
            raise Nonconformance(f"a request in hand was closed: its result or Cancelled was expected, not {reply}")
        peer.tell(request)
        await _refused(peer, request, "it comes again after its generation was closed", "unknown_generation")
    await peer.silence(0.2, "a request has one terminal reply")


async def needs_a_prefix_it_does_not_hold(peer: Peer) -> None:
    """A prefix that is too long, or another text, is answered by NeedPrefix (section 5.9)"""
    generation = peer.open()
    too_long = peer.request(generation, held=PROMPT)
    peer.tell(too_long)
    require(await peer.reply(NeedPrefix, too_long), "it holds nothing of this generation", held=0)
    first = peer.request(generation)
    peer.tell(first)
    await peer.terminal(first)
    other_text = peer.request(generation, held=(*PROMPT[:-1], 9), tokens=())
    peer.tell(other_text)
    require(await peer.reply(NeedPrefix, other_text), "it holds another text, so all of it must come again", held=0)


async def answers_what_comes_twice_once(peer: Peer) -> None:
    """A request that comes again after its terminal reply gets that reply again, and nothing else (section 5.15)"""
    request = peer.request()
    peer.tell(request)
    first = await peer.terminal(request)
    peer.tell(request)
    again = await peer.reply(type(first), request)
    require_same(again, first, "the terminal reply that comes again is the same as the first")


async def takes_a_cancel_before_its_request(peer: Peer) -> None:
    """A cancel may come before its request, may come twice, and covers earlier attempts (section 5.13)"""
    generation = peer.open()
    first, second = peer.request(generation), peer.request(generation)
    peer.tell(Cancel(generation, second.attempt))
    peer.tell(Cancel(generation, second.attempt))
    for request in (first, second):
        peer.tell(request)
        await peer.reply(Cancelled, request)
    third = peer.request(generation)
    peer.tell(third)
    if isinstance(await peer.terminal(third), Cancelled):
        raise Nonconformance("an attempt later than the cancelled one was cancelled, too")


async def ends_what_is_cancelled(peer: Peer) -> None:
    """A request that is cancelled while it runs has its one terminal reply soon (section 5.13)"""
    for _ in range(5):
        request = peer.request(count=30)
        peer.tell(request)
        peer.tell(Cancel(request.generation, request.attempt))
        await peer.terminal(request)
    await peer.silence(0.2, "a request has one terminal reply")


async def refuses_what_is_out_of_range(peer: Peer) -> None:
    """A start, count, token or position out of range is answered by Failed, code limit, and changes nothing (section 5.8)"""
    holds_nothing, holds_prompt = peer.open(), peer.open()
    first = peer.request(holds_prompt)
    peer.tell(first)
    await peer.terminal(first)
    for generation in (holds_nothing, holds_prompt):
        for what, request in _out_of_range(peer, generation):
            peer.tell(request)
            await _refused(peer, request, what, "limit")
    after = peer.request(holds_prompt, held=PROMPT, tokens=())
    peer.tell(after)
    if isinstance(reply := await peer.terminal(after), NeedPrefix | Failed):
        raise Nonconformance(f"it held {len(PROMPT)} tokens before it refused other requests, and now answers {reply}")


def _out_of_range(peer: Peer, generation: int) -> list[tuple[str, Draft | Verify]]:
    """Requests that this worker must refuse, whatever it holds, and what is wrong with each."""
    assert peer.ready is not None
    end, short = len(PROMPT), PROMPT[:5]
    if peer.drafts:
        return [
            ("count is 0", peer.draft(generation, PROMPT, 0, 1)),
            ("block is 0", peer.draft(generation, PROMPT, 1, 0)),
            ("start is 0", peer.draft(generation, (), 1, 1, start=0)),
            ("start lies before base + len(tokens)", peer.draft(generation, PROMPT, 1, 1, start=end - 1)),
            ("start lies before base", peer.draft(generation, (), 1, 1, held=short, start=len(short) - 1)),
            ("it goes beyond max_length", peer.draft(generation, PROMPT, peer.ready.max_length, 1)),
        ]
    found: list[tuple[str, Draft | Verify]] = [
        ("start is 0", peer.verify(generation, PROMPT, 0)),
        ("start lies beyond base + len(tokens)", peer.verify(generation, PROMPT, end + 1)),
        ("start lies beyond base + len(tokens)", peer.verify(generation, (), len(short) + 1, held=short)),
        ("there is no token before start", peer.verify(generation, (), 1)),
    ]
    if size := peer.ready.vocabulary_size:
        found.append(("a token lies outside the vocabulary", peer.verify(generation, (*PROMPT, size), 3)))
    return found


async def refuses_requests_of_the_other_role(peer: Peer) -> None:
    """A drafter answers Verify, and a target server Draft, with Failed, code request (section 5.8)"""
    generation = peer.open()
    other: Draft | Verify = (
        peer.verify(generation, PROMPT, len(PROMPT)) if peer.drafts else peer.draft(generation, PROMPT, 1, 1)
    )
    peer.tell(other)
    await _refused(peer, other, f"it is not for a {'drafter' if peer.drafts else 'target server'}", "request")


async def forgets_idle_generations_only(peer: Peer) -> None:
    """It holds 256 open generations, and makes room for one more (section 5.7)"""
    opened = [peer.open() for _ in range(256)]
    for generation in (opened[0], opened[-1], None):  # None: one more
        request = peer.request(generation)
        peer.tell(request)
        if isinstance(reply := await peer.terminal(request), Failed):
            raise Nonconformance(f"a generation was not served: {reply.message}")


async def _refused(peer: Peer, request: Draft | Verify, what: str, code: str) -> None:
    failed = await peer.reply(Failed, request)
    require(failed, f"{type(request).__name__} {request.attempt} must fail, since {what}", code=code)
