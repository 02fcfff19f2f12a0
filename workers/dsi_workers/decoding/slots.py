"""Which generation has which slot of the KV cache, and what is still in the slots of those that ended.

A chat's next turn begins with the text of the turns before. A slot keeps what its last generation read, until another
needs the memory, the least recently used first; a generation whose prompt begins like that takes the slot over.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from dsi_workers.session import Session


@dataclass(slots=True)
class _Slot:
    #: Whose it is now.
    session: Session | None = None
    #: What an earlier generation left: positions [0, len(text)) of the cache were computed for these tokens.
    text: list[int] = field(default_factory=list)


class Slots:
    """`number` slots. An exact engine reuses whole blocks of the prompt only, which are computed alike in every generation:
    `block` positions together, from position 0 on. The answer is computed in other forwards than a prompt would be. With
    `block` None, of an engine that only guesses, everything is reused."""

    def __init__(self, number: int, block: int | None) -> None:
        self._block = block
        self._slots: OrderedDict[int, _Slot] = OrderedDict(
            (slot, _Slot()) for slot in range(number)
        )  # next victim first
        self._slot_of: dict[int, int] = {}
        #: Positions that did not need to be computed.
        self.reused = 0

    def of(self, session: Session) -> int:
        """The session's slot. If it has none, it gets one, and session.computed says how much of its text is in there; if
        all are taken, the least recently used session will compute again."""
        number = self._slot_of.get(session.generation)
        if number is None or self._slots[number].session is not session:
            number = self._take(session)
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
        """The generation is closed. What it read stays until the slot is needed."""
        number = self._slot_of.pop(session.generation, None)
        if number is not None:
            slot = self._slots[number]
            slot.session, slot.text = None, session.tokens[: self._reusable(session)]

    def _reusable(self, session: Session) -> int:
        if self._block is None:
            return session.computed
        return min(session.computed, session.prompt_length) // self._block * self._block

    def _take(self, session: Session) -> int:
        free = [number for number, slot in self._slots.items() if slot.session is None]
        if not free:
            number = next(iter(self._slots))
            loser = self._slots[number].session
            assert loser is not None
            loser.computed = 0
            del self._slot_of[loser.generation]
            self._slots[number] = _Slot(session)
            session.computed = 0
            return number
        held = {number: self._common(self._slots[number].text, session) for number in free}
        number = max(free, key=lambda number: held[number])  # of equals the one that was not used for longest
        session.computed = held[number]
        self.reused += held[number]
        self._slots[number] = _Slot(session)
        return number

    def _common(self, text: list[int], session: Session) -> int:
        most = min(len(text), len(session.tokens))
        same = next((at for at in range(most) if text[at] != session.tokens[at]), most)
        return same if self._block is None else min(same, session.prompt_length) // self._block * self._block
