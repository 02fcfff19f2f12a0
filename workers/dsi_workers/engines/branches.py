"""Branches of a model drafter: each is a row of the forward, with keys and values in a slot of its own.

A branch leaves the main path at its fork. When it is first continued, the keys and values before the fork are copied from the
slot of the main path: a copy costs little beside a forward. From then on the branch needs one position per step. When the branch
becomes the main path, the two slots change places, and no position is computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsi_workers.backend import Backend, Run
from dsi_workers.decoding.slots import Slots
from dsi_workers.engine import Task
from dsi_workers.engines.choice import Choice
from dsi_workers.grammar import Row
from dsi_workers.session import Session
from dsi_workers.tree import Branch


@dataclass(slots=True)
class _Slot:
    """What a slot holds: positions [0, computed) of a branch. The first `copied` ones belong to the main path of `source`, as
    it was at `revision`."""

    session: Session | None = None
    branch: Branch | None = None
    computed: int = 0
    source: Session | None = None
    revision: int = 0
    copied: int = 0
    #: The number of the last step that used the slot.
    step: int = 0

    def in_use(self) -> bool:
        """Whether the drafts of the generation still have the branch. The loop drops branches without telling the engine."""
        return self.session is not None and self.branch in self.session.drafts.branches

    def in_common(self, session: Session, length: int) -> int:
        """Of the first `length` positions of the session's main path, how many the slot holds.

        Only for the slot of another session are tokens compared.
        """
        if self.source is None:
            return 0
        held = min(length, self.copied, self.source.unchanged_since(self.revision))
        return held if self.source is session else _common_prefix_length(self.source.tokens, session.tokens, held)


class Branches:
    """The branches of all generations of a drafter, in the backend's `branch_slots`.

    If there are more branches than slots, the least recently used branch loses its slot and is computed again later. A branch
    for which the other branches of the same step leave no slot is not continued in that step.
    """

    def __init__(self, backend: Backend, slots: Slots, choice: Choice) -> None:
        """`slots`: the slots of the main paths. `choice` chooses the tokens."""
        self._backend = backend
        self._main_slots = slots
        self._choice = choice
        # The least recently used comes first.
        self._slots = OrderedDict((backend.slots + number, _Slot()) for number in range(backend.branch_slots))
        self._steps = 0
        self._asked: list[tuple[Task, list[tuple[int, _Slot, Run]]]] = []

    @property
    def most_rows(self) -> int:
        """The most rows of one generation's step. Two generations can have as many at once."""
        return 1 + self._backend.branch_slots // 2

    def rows(self, tasks: Sequence[Task]) -> int:
        """How many of the backend's rows the branches of these tasks take."""
        return sum(len(task.branches) for task in tasks) * self._backend.rows(Run(0, [0], 0, 0, 0))

    def begin_step(self, tasks: Sequence[Task]) -> None:
        """Keep the slots of these tasks' branches until the step ends. Call this before the first forward of a step."""
        self._steps += 1
        wanted = {id(branch) for task in tasks for branch in task.branches}
        for slot in self._slots.values():
            if slot.branch is not None and id(slot.branch) in wanted:
                slot.step = self._steps

    def runs(self, tasks: Sequence[Task]) -> list[Run]:
        """Return what the next forward computes for the branches of these tasks, whose main paths it completes."""
        self._asked = [(task, self._runs_of(task)) for task in tasks if task.branches]
        return [run for _, asked in self._asked for _, _, run in asked]

    def texts(self, task: Task) -> list[Row]:
        """The texts of the task's branches that the next forward continues."""
        places = [place for each, asked in self._asked if each is task for place, _, _ in asked]
        branches = [task.branches[place] for place in places]
        return [Row(branch.end, tuple(branch.tokens), branch.fork) for branch in branches]

    def answer(self, logits: Sequence[torch.Tensor]) -> None:
        """Continue the branches by the logits of the runs that `runs` returned: [1, vocabulary] each."""
        rest = list(logits)
        for task, asked in self._asked:
            own, rest = rest[: len(asked)], rest[len(asked) :]
            task.answer.continued = [None] * len(task.branches)
            branches = [task.branches[place] for place, _, _ in asked]
            tokens = self._choice.after(task.session, branches, torch.cat(own)) if own else []
            for (place, slot, run), token in zip(asked, tokens, strict=True):
                slot.computed = run.begin + len(run.tokens)
                task.answer.continued[place] = token

    def promote(self, session: Session, branch: Branch) -> bool:
        """Let the branch take the place of the end of session.tokens, with its keys and values. Returns False, and does nothing,
        if these are not here."""
        number = next((number for number, slot in self._slots.items() if slot.branch is branch), None)
        if number is None:
            return False
        left = self._main_slots.exchange(session, number)
        if left is None:
            return False
        computed = self._slots.pop(number).computed
        kept = min(branch.fork, session.computed)
        self._slots[left] = _Slot(source=session, revision=session.revision, copied=kept)
        session.write(branch.fork, branch.tokens)
        session.computed = computed
        return True

    def forget(self, session: Session) -> None:
        """The generation is closed."""
        for slot in self._slots.values():
            if slot.session is session:
                slot.session = slot.branch = None

    def _runs_of(self, task: Task) -> list[tuple[int, _Slot, Run]]:
        """For each branch that is continued: its place in task.branches, its slot and its run."""
        found = []
        held = {id(slot.branch): number for number, slot in self._slots.items() if slot.branch is not None}
        for place, branch in enumerate(task.branches):
            number = held.get(id(branch))
            if number is None:
                number = self._take(task.session, branch)
            if number is None or branch.end > self._backend.max_length:
                continue
            slot = self._slots[number]
            slot.step = self._steps
            self._slots.move_to_end(number)
            begin = min(slot.computed, branch.end - 1)
            tokens = [*task.session.tokens[begin : branch.fork], *branch.tokens[max(0, begin - branch.fork) :]]
            found.append((place, slot, Run(number, tokens, begin, 0, branch.end - 1)))
        return found

    def _take(self, session: Session, branch: Branch) -> int | None:
        """Give the branch a slot, with the keys and values of the main path before its fork. None: all slots are in use by this
        step."""
        free = [number for number, slot in self._slots.items() if slot.step != self._steps]
        unused = [number for number in free if not self._slots[number].in_use()]
        if not free:
            return None
        candidates = unused or free[:1]
        own = [number for number in candidates if self._slots[number].source is session]
        length = min(branch.fork, session.computed)
        held = {number: self._slots[number].in_common(session, length) for number in own or candidates}
        number = max(held, key=lambda number: held[number])
        if held[number] < length:
            self._backend.copy(self._main_slots.of(session), number, held[number], length)
        self._slots[number] = _Slot(session, branch, length, session, session.revision, length)
        return number


def _common_prefix_length(left: Sequence[int], right: Sequence[int], most: int) -> int:
    """The number of equal tokens at the beginning, at most `most`. Slices are compared: that is faster than single tokens."""
    begin, step = 0, 64
    while begin < most and left[begin : min(begin + step, most)] == right[begin : min(begin + step, most)]:
        begin, step = begin + step, 2 * step
    end = min(begin + step, most)
    return next((at for at in range(begin, end) if left[at] != right[at]), end)
