"""Assigns slots of the KV cache to generations, and reuses the prefix that an ended generation left in a slot.

The next turn of a chat begins with the text of the turns before. So a slot keeps its contents after its generation ends,
until another generation needs the slot. A new generation takes the free slot that shares the longest prefix with its text;
among equals, the least recently used one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from dsi_workers.session import Session


@dataclass(slots=True)
class _Slot:
    #: The session that uses the slot; None if the slot is free.
    session: Session | None = None
    #: In a free slot: positions [0, len(cached_tokens)) of the cache were computed for these tokens.
    cached_tokens: list[int] = field(default_factory=list)


class Slots:
    """The slots 0 to `number` - 1.

    A target may reuse only whole blocks of the prompt: `block` positions each, counted from position 0. Every generation
    computes such a block in the same forward pass, so its bits are the same. Positions after the prompt were computed in
    other forward passes. With `block` None, as for a drafter, whose bits do not matter, all positions are reused.
    """

    def __init__(self, number: int, block: int | None) -> None:
        self._block = block
        self._slots: OrderedDict[int, _Slot] = OrderedDict(
            (slot, _Slot()) for slot in range(number)
        )  # least recently used first
        #: Slot of each generation.
        self._slot_of: dict[int, int] = {}
        #: Positions reused so far, instead of computed again.
        self.reused = 0

    def of(self, session: Session) -> int:
        """Return the session's slot. Assigns one if the session has none.

        After an assignment, `session.computed` is the number of positions that are already in the slot. If all slots are in
        use, the least recently used session loses its slot and must compute its positions again.
        """
        number = self._slot_of.get(session.generation)
        if number is None or self._slots[number].session is not session:
            number = self._assign(session)
            self._slot_of[session.generation] = number
        self._slots.move_to_end(number)
        return number

    def exchange(self, session: Session, slot: int) -> int | None:
        """Give the session the slot number `slot`, which is none of these, for its own. Returns the number of its own, which is
        none of these then; None, and nothing happens, if the session has no slot."""
        number = self._slot_of.get(session.generation)
        if number is None or self._slots[number].session is not session:
            return None
        self._slots[slot] = self._slots.pop(number)
        self._slot_of[session.generation] = slot
        return number

    def forget(self, session: Session) -> None:
        """Free the slot of a closed generation. Its contents stay until the slot is needed."""
        number = self._slot_of.pop(session.generation, None)
        if number is not None:
            slot = self._slots[number]
            slot.session, slot.cached_tokens = None, session.tokens[: self._reusable(session)]

    def _reusable(self, session: Session) -> int:
        """How many positions of the session another generation may reuse."""
        if self._block is None:
            return session.computed
        return min(session.computed, session.prompt_length) // self._block * self._block

    def _assign(self, session: Session) -> int:
        free = [number for number, slot in self._slots.items() if slot.session is None]
        if not free:
            number = next(iter(self._slots))
            evicted = self._slots[number].session
            assert evicted is not None
            evicted.computed = 0
            del self._slot_of[evicted.generation]
            self._slots[number] = _Slot(session)
            session.computed = 0
            return number
        shared = {number: self._shared_prefix(self._slots[number].cached_tokens, session) for number in free}
        number = max(free, key=lambda number: shared[number])  # among equals, the least recently used
        session.computed = shared[number]
        self.reused += shared[number]
        session.reused = max(session.reused, shared[number])
        self._slots[number] = _Slot(session)
        return number

    def _shared_prefix(self, cached_tokens: list[int], session: Session) -> int:
        """Positions of the slot that the session can reuse."""
        most = min(len(cached_tokens), len(session.tokens))
        same = next((at for at in range(most) if cached_tokens[at] != session.tokens[at]), most)
        return same if self._block is None else min(same, session.prompt_length) // self._block * self._block
