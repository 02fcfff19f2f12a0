"""Checks of target servers that go on by themselves (section 5.18). A server need not: then they do not apply."""

from __future__ import annotations

from dsi_actors.conformance.differences import Nonconformance, NotApplicable, items, require, require_kind
from dsi_actors.conformance.peer import PROMPT, Peer
from dsi_protocol import Cancelled, Verified, Verify

_LENGTH = len(PROMPT)


async def goes_on_as_far_as_it_may(peer: Peer) -> None:
    """With `ahead` a server gives the tokens that it gives when asked for each, and no more than it may (section 5.18)"""
    truth = await _truth(peer, 4)
    request = peer.verify(peer.open(), PROMPT, _LENGTH, ahead=3)
    peer.tell(request)
    answers = await _answers(peer, request)
    require(answers[0], "the first answer is that of any Verify", start=_LENGTH, tokens=truth[:1])
    for further, answer in enumerate(answers[1:], 1):
        why = f"answer {further} ahead follows from the tokens before"
        require(answer, why, start=_LENGTH + further, tokens=truth[further : further + 1])
    if len(answers) > 1 + request.ahead:
        raise Nonconformance(f"a server gives at most {request.ahead} answers ahead here, not {len(answers) - 1}")


async def goes_on_behind_a_wrong_guess_only(peer: Peer) -> None:
    """A server goes on behind a wrong guess, and not if all guesses were right (section 5.18)"""
    assert peer.ready is not None
    truth = await _truth(peer, 3)
    right = peer.verify(peer.open(), PROMPT + truth[:1], _LENGTH, ahead=1)
    peer.tell(right)
    require(await peer.reply(Verified, right), "all guesses were right", tokens=truth[:2], more=False)
    wrong = (truth[0] + 1) % max(2, peer.ready.vocabulary_size)
    request = peer.verify(peer.open(), (*PROMPT, wrong, *truth[1:]), _LENGTH, ahead=1)
    peer.tell(request)
    first, *further = await _answers(peer, request)
    require(first, "the first guess was wrong", start=_LENGTH, tokens=truth[:1])
    for answer in further:
        require(
            answer, "it follows from the target's own token, not from the guess", start=_LENGTH + 1, tokens=truth[1:2]
        )


async def ends_going_on_when_asked_again(peer: Peer) -> None:
    """A later Verify ends what a server does by itself, and may build on the tokens that it gave (section 5.18)"""
    assert peer.ready is not None
    truth = await _truth(peer, 2)
    generation = peer.open()
    request = peer.verify(generation, PROMPT, _LENGTH, ahead=peer.ready.max_length)
    peer.tell(request)
    first = await peer.reply(Verified, request)
    if not first.more:
        raise NotApplicable("it does not go on by itself")
    later = peer.verify(generation, (), _LENGTH + 1, held=(*PROMPT, *truth[:1]))
    peer.tell(later)
    why = "the request that it went on with has one terminal reply, before the later one has its own"
    last = await peer.terminal(request)
    if not isinstance(last, Verified):  # it may have come to its end before it heard
        require_kind(last, Cancelled, why)
    require(await peer.reply(Verified, later), why, start=_LENGTH + 1, tokens=truth[1:2])


async def _answers(peer: Peer, request: Verify) -> list[Verified]:
    """All answers to a request, of which the server may go on by itself. Raises NotApplicable if it never does."""
    answers = [await peer.reply(Verified, request)]
    if not answers[0].more:
        raise NotApplicable("it does not go on by itself")
    while answers[-1].more:
        answers.append(await peer.reply(Verified, request))
        require(answers[-1], "each further answer has one token", tokens=items(1, 1))
    return answers


async def _truth(peer: Peer, count: int) -> tuple[int, ...]:
    """The target's first tokens, asked for one at a time."""
    generation = peer.open()
    text: tuple[int, ...] = PROMPT
    for _ in range(count):
        held = text[:-1] if len(text) > _LENGTH else ()
        request = peer.verify(generation, text[len(held) :], len(text), held=held)
        peer.tell(request)
        text += (await peer.reply(Verified, request)).tokens
    return text[_LENGTH:]
