"""Checks of drafters: which positions they guess, and in which blocks."""

from __future__ import annotations

from dsi_actors.conformance.differences import require
from dsi_actors.conformance.peer import PROMPT, Peer
from dsi_protocol import Failed


async def drafts_in_blocks(peer: Peer) -> None:
    """Guesses come in blocks, in order, and no more than asked for (section 5.11)"""
    for count, block in ((6, 1), (6, 4), (5, 100)):
        request = peer.draft(peer.open(), PROMPT, count, block)
        peer.tell(request)
        await peer.drafted(request)


async def drafts_on(peer: Peer) -> None:
    """A draft may continue the worker's own guesses, and begin again behind a correction (section 5.11)"""
    generation = peer.open()
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


async def drafts_from_the_tokens_it_holds(peer: Peer) -> None:
    """Guesses begin at start if the worker holds that many tokens, else where its tokens end (section 5.11)"""
    generation = peer.open()
    beyond = peer.draft(generation, PROMPT, 2, 1, start=len(PROMPT) + 3)
    peer.tell(beyond)
    await peer.drafted(beyond, first=len(PROMPT))
    inside = peer.draft(generation, (), 3, 1, held=PROMPT[:5], start=len(PROMPT) - 2)
    peer.tell(inside)
    await peer.drafted(inside)
    elsewhere = peer.draft(generation, (9,), 2, 1, held=PROMPT[:5], start=len(PROMPT))
    peer.tell(elsewhere)  # another token than the one held there: what was held behind it is gone
    await peer.drafted(elsewhere, first=6)


async def drafts_again_what_was_lost(peer: Peer) -> None:
    """Guesses that were lost on their way are asked for again by a draft that starts at the gap (section 5.16)"""
    generation = peer.open()
    first = peer.draft(generation, PROMPT, 4, 1)
    peer.tell(first)
    arrived = (await peer.drafted(first))[:1]  # and the blocks after the first one are taken for lost
    again = peer.draft(generation, (), 3, 1, held=PROMPT + arrived)
    peer.tell(again)
    await peer.drafted(again)


async def has_something_to_continue(peer: Peer) -> None:
    """A draft in a generation without any token is answered by Failed, code limit (section 5.11)"""
    request = peer.draft(peer.open(), (), 1, 1, start=1)
    peer.tell(request)
    require(await peer.reply(Failed, request), "there is no token to continue", code="limit")
