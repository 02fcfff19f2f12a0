"""Checks of how a worker joins, shows that it lives, and leaves."""

from __future__ import annotations

import time

from dsi_actors.conformance.differences import (
    Nonconformance,
    at_least,
    one_of,
    require,
    require_same,
)
from dsi_actors.conformance.peer import HEARTBEAT_MS, Peer
from dsi_protocol import PROTOCOL_VERSION, Failed, Goodbye, Hello, Ready

_FOREIGN_ENGINE = "no-such-engine"
#: A worker that was dismissed may take so long to end.
_LEAVING_S = 10.0


async def repeats_hello(peer: Peer) -> None:
    """Hello comes again until it is answered (section 5.1)"""
    first = await peer.take(Hello, within_s=60.0)
    second = await peer.take(Hello, within_s=3.0)
    require_same(second, first, "a repeated Hello is the same as the first")
    roles = one_of("auto", "target", "drafter")
    require(first, "Hello says what the worker can be", version=PROTOCOL_VERSION, role=roles)


async def becomes_ready(peer: Peer) -> None:
    """Welcome is answered by Ready (section 5.1)"""
    peer.welcome()
    peer.ready = ready = await peer.take(Ready, "Ready is the answer to Welcome", within_s=300.0)
    if bool(ready.vocabulary) != bool(ready.vocabulary_size):
        why = "vocabulary is empty if and only if vocabulary_size is 0"
        require(ready, why, vocabulary_size=0 if not ready.vocabulary else at_least(1))
    require(ready, "Ready says what the worker can do", max_length=at_least(64), slots=at_least(1))
    if not peer.drafts:
        require(ready, "a target server has a window and a vocabulary", window=at_least(1), vocabulary_size=at_least(1))


async def refuses_a_foreign_engine(peer: Peer) -> None:
    """A Welcome with an engine that the worker does not have is answered by Failed, code load; then it ends (section 5.2)"""
    peer.welcome(engine=_FOREIGN_ENGINE)
    failed = await peer.take(Failed, f"it does not have the engine {_FOREIGN_ENGINE!r}", within_s=60.0)
    require(failed, "Failed about the worker itself names no request", generation=0, attempt=0, code="load")
    if not failed.message:
        raise Nonconformance("Failed has a message for people, which says why the worker cannot be what is asked")
    await peer.until(lambda: not peer.is_connected(), 10.0, "it is still connected after Failed: the process must end")


async def beats(peer: Peer) -> None:
    """Heartbeats come every heartbeat_ms, and their sequence rises (section 5.4)"""
    before, interval_s = len(peer.heartbeats), HEARTBEAT_MS / 1e3
    few = "fewer than 10 heartbeats in the time of 20"
    await peer.until(lambda: len(peer.heartbeats) >= before + 10, 20 * interval_s, few)
    # Heartbeats may have waited here to be read, so the time counts from Welcome on.
    due = (time.monotonic() - peer.welcomed_s) / interval_s
    if len(peer.heartbeats) > 5 + 1.5 * due:
        raise Nonconformance(f"{len(peer.heartbeats)} heartbeats in the time of {due:.0f}")
    numbers = [beat.sequence for beat in peer.heartbeats]
    if numbers != sorted(set(numbers)):
        raise Nonconformance("the sequence of heartbeats does not rise")
    assert peer.hello is not None
    for beat in peer.heartbeats:
        require(beat, "a heartbeat names the incarnation of Hello", incarnation=peer.hello.incarnation)


async def is_ready_again(peer: Peer) -> None:
    """A repeated Welcome is answered by the same Ready again (section 5.1)"""
    assert peer.ready is not None
    peer.welcome()
    again = await peer.take(Ready, "Ready is the answer to a repeated Welcome")
    require_same(again, peer.ready, "a repeated Ready is the same as the first")


async def ends_when_dismissed(peer: Peer) -> None:
    """Goodbye without `again`: the worker ends (section 5.6)"""
    peer.tell(Goodbye("the examination is over"))
    await peer.until(peer.has_left, _LEAVING_S, f"it is still connected {_LEAVING_S:g} s after Goodbye")
