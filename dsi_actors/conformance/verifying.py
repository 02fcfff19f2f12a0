"""Checks of target servers: which tokens they answer, and with which numbers."""

from __future__ import annotations

from dsi_actors.conformance.differences import Nonconformance, items, require
from dsi_actors.conformance.peer import PROMPT, Peer
from dsi_protocol import NeedPrefix, Scored, Verified

#: Log probabilities of one token differ by less where a text is read in other pieces.
_ROUNDING = 0.1


async def verifies_the_same_however_it_is_asked(peer: Peer) -> None:
    """The target's tokens depend neither on the guesses nor on how they are grouped (section 5.10)"""
    truth: tuple[int, ...] = ()
    generation = peer.open()
    for position in range(4):
        tokens = (PROMPT + truth)[max(0, len(PROMPT) + position - 1) :] if position else PROMPT
        held = (PROMPT + truth)[: -len(tokens)] if position else ()
        request = peer.verify(generation, tokens, len(PROMPT) + position, held=held)
        peer.tell(request)
        reply = await peer.reply(Verified, request)
        why = "a verification without guesses has one token"
        require(reply, why, start=len(PROMPT) + position, tokens=items(1, 1), logprobs=())
        truth += reply.tokens
    assert peer.ready is not None
    wrong = (truth[1] + 1) % max(2, peer.ready.vocabulary_size)
    for guesses, expected in (((), truth[:1]), (truth[:3], truth[:4]), ((truth[0], wrong, truth[2]), truth[:2])):
        request = peer.verify(peer.open(), PROMPT + guesses, len(PROMPT))
        peer.tell(request)
        why = f"with the guesses {guesses} the tokens are those that it gives one at a time"
        require(await peer.reply(Verified, request), why, start=len(PROMPT), tokens=expected)


async def verifies_what_is_asked_only(peer: Peer) -> None:
    """A verification ends at base + len(tokens), and what is held beyond is forgotten (section 5.10)"""
    generation = peer.open()
    long = peer.verify(generation, PROMPT, len(PROMPT))
    peer.tell(long)
    await peer.reply(Verified, long)
    short = peer.verify(generation, (), 5, held=PROMPT[:5])
    peer.tell(short)
    why = "it brings no guess, whatever else the worker holds"
    require(await peer.reply(Verified, short), why, start=5, tokens=items(1, 1))
    before = peer.verify(generation, PROMPT[5:], 5, held=PROMPT[:5])
    peer.tell(before)
    await peer.reply(Verified, before)
    shorter = peer.verify(generation, (), 3, held=PROMPT[:5])
    peer.tell(shorter)
    why = "it checks the tokens at positions 3 and 4, which lie before base"
    require(await peer.reply(Verified, shorter), why, start=3, tokens=items(1, 3))
    gone = peer.verify(generation, (), len(PROMPT), held=PROMPT)
    peer.tell(gone)
    why = "the request before ended at position 5"
    require(await peer.reply(NeedPrefix, gone), why, held=5)


async def gives_logprobs_when_asked(peer: Peer) -> None:
    """A generation with logprobs has one for each token, others have none (section 5.10)"""
    for wanted in (True, False):
        request = peer.verify(peer.open(logprobs=wanted), PROMPT, len(PROMPT))
        peer.tell(request)
        reply = await peer.reply(Verified, request)
        count = len(reply.tokens) if wanted else 0
        require(reply, f"logprobs is {wanted} in OpenGeneration", logprobs=items(count, count))
        if any(value > 1e-6 for value in reply.logprobs):
            raise Nonconformance(f"a logarithm of a probability is at most 0, not one of {reply.logprobs}")


async def tells_the_most_probable_tokens(peer: Peer) -> None:
    """A generation with top_logprobs has so many tokens for each position, the most probable first (section 5.10)"""
    assert peer.ready is not None
    request = peer.verify(peer.open(logprobs=True, top_logprobs=3), PROMPT, 1)
    peer.tell(request)
    reply = await peer.reply(Verified, request)
    tops = _tops(reply, len(reply.tokens), peer)
    for token, logprob, (tokens, values) in zip(reply.tokens, reply.logprobs, tops, strict=True):
        if token != tokens[0] or logprob != values[0]:
            raise Nonconformance(
                f"a greedy answer has the most probable token, {tokens[0]} with {values[0]}, not {token}"
            )


async def tells_how_probable_a_text_is(peer: Peer) -> None:
    """A Score has a log probability for each token of the text, in blocks without a gap (section 5.19)"""
    generation = peer.open(logprobs=True, top_logprobs=3)
    request = peer.verify(generation, PROMPT, len(PROMPT))
    peer.tell(request)
    own = await peer.reply(Verified, request)
    text, found = PROMPT + own.tokens, list[tuple[float, ...]]()
    for start in (1, len(PROMPT)):
        score = peer.score(generation, text, start)
        peer.tell(score)
        blocks = await peer.scored(score)
        found.append(tuple(logprob for block in blocks for logprob in block.logprobs))
        for block in blocks:
            _tops(block, len(block.logprobs), peer)
    if found[0][len(PROMPT) - 1 :] != found[1]:
        raise Nonconformance(
            "the log probability of a token depends on the text before it, not on where a Score starts"
        )
    if abs(found[1][0] - own.logprobs[0]) > _ROUNDING:
        raise Nonconformance(
            f"the log probability of its own token is {own.logprobs[0]} in Verified, not {found[1][0]}"
        )


def _tops(reply: Verified | Scored, count: int, peer: Peer) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """For each of `count` positions the three most probable tokens of a reply, with their log probabilities."""
    assert peer.ready is not None
    each = min(3, peer.ready.vocabulary_size)
    why = f"top_logprobs is 3 in OpenGeneration, and {count} positions are told"
    most = items(each * count, each * count)
    require(reply, why, top_tokens=most, top_logprobs=most)
    places = [slice(begin, begin + each) for begin in range(0, each * count, each)]
    tops = [(reply.top_tokens[place], reply.top_logprobs[place]) for place in places]
    for tokens, values in tops:
        if len(set(tokens)) < each or list(values) != sorted(values, reverse=True):
            raise Nonconformance(
                f"the most probable tokens stand in their order, each once, not {tokens} with {values}"
            )
    return tops


async def samples_by_the_seed(peer: Peer) -> None:
    """Sampled tokens depend on the seed and on nothing else (section 7)"""
    answers: list[tuple[int, ...]] = []
    for _ in range(2):
        request = peer.verify(peer.open(temperature=1.0, seed=5), PROMPT, len(PROMPT))
        peer.tell(request)
        reply = await peer.reply(Verified, request)
        if answers:
            require(reply, "the same prompt and seed give the same tokens", tokens=answers[0])
        answers.append(reply.tokens)
