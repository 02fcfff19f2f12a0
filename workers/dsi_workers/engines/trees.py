"""How a target verifies a tree: which branches a forward computes, and the walk along the forward's logits.

A branch's run begins where its path leaves the main path. A branch that leaves another one computes the tokens that both have
again: drafters seldom make such branches, and so a run has only one place from which it differs from the main path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dsi_workers.backend import Run
from dsi_workers.engine import RequestError, Task
from dsi_workers.engines.choice import Choice
from dsi_workers.grammar import Row
from dsi_workers.tree import Branch, Walk


@dataclass(slots=True)
class Share:
    """What one forward computes for one task."""

    #: Of the main path; of a task without a tree the only run.
    main: Run | None
    branches: list[tuple[Branch, list[Run]]] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """In the order in which a backend wants them."""
        main = [] if self.main is None else [self.main]
        return main + [run for _, runs in self.branches for run in runs]

    @property
    def main_end(self) -> int:
        """Positions of the main path before this one are computed when branches are."""
        return self.runs[0].begin + (0 if self.main is None else len(self.main.tokens))


def rows_of(task: Task, share: Share) -> list[Row]:
    """The texts after which the forward gives logits."""
    rows, length = list[Row](), len(task.session.tokens)
    if (main := share.main) is not None:
        guess = main.tokens[length - main.begin :]
        positions = range(main.first_logits + 1, main.begin + len(main.tokens) + 1)
        rows += [Row(position, guess, length) for position in positions]
    for branch, _ in share.branches:
        fork, tokens = path_of(branch)
        positions = range(max(branch.fork, task.start - 1 + len(task.answer.tokens)) + 1, fork + len(tokens) + 1)
        rows += [Row(position, tokens, fork) for position in positions]
    return rows


def has_tree(task: Task) -> bool:
    """Whether the task is the verification of a tree. Raises RequestError if a branch lies within the prompt."""
    if not task.branches or task.count is not None:
        return False
    if any(branch.fork < task.session.prompt_length for branch in task.branches):
        raise RequestError(
            "a branch leaves the main path within the prompt: only what follows the prompt may be a tree"
        )
    return True


def walk_of(task: Task) -> Walk | None:
    """The walk along the tree of `task`, as far as it is answered. None: the answer has left the tree, and so is complete."""
    walk = Walk(task.session.tokens, task.branches, task.start)
    return walk if all([walk.takes(token) for token in task.answer.tokens]) else None


def main_end(task: Task) -> int:
    """One past the last position of the main path that the task still needs."""
    walk = walk_of(task)
    return len(task.session.tokens) if walk is None or walk.branch is None else path_of(walk.branch)[0]


def path_of(branch: Branch) -> tuple[int, list[int]]:
    """Where the branch's path leaves the main path, and the path's tokens from there to the branch's end."""
    fork, tokens, parent = branch.fork, list(branch.tokens), branch.parent
    while parent is not None:
        tokens[:0] = parent.tokens[: fork - parent.fork]
        fork, parent = parent.fork, parent.parent
    return fork, tokens


def branches_to_compute(task: Task, end: int) -> list[Branch]:
    """The branches that the answer may go along, once positions [0, end) of the main path are computed: those that leave first
    come first."""
    walk = walk_of(task)
    assert walk is not None
    if walk.branch is None:
        found = [branch for branch in task.branches if walk.position <= path_of(branch)[0] <= end]
    elif path_of(walk.branch)[0] <= end:
        found = [branch for branch in task.branches if _leads_along(branch, walk.branch)]
    else:
        found = []
    return sorted(found, key=lambda branch: branch.fork)


def runs_of(branch: Branch, task: Task, slot: int, window: int) -> list[Run]:
    """The branch's path from the main path on, at most `window` positions in a run. Wanted are the logits after the branch's own
    tokens."""
    fork, tokens = path_of(branch)
    first_logits = max(branch.fork, task.start - 1 + len(task.answer.tokens))
    return [
        Run(slot, tokens[begin : begin + window], fork + begin, 0, first_logits, fork)
        for begin in range(0, len(tokens), window)
    ]


def answer_along(
    task: Task, choice: Choice, main: torch.Tensor | None, computed: Sequence[tuple[Branch, torch.Tensor]]
) -> None:
    """Choose tokens along the tree as far as there are logits, and say whether the task is done.

    `main`: the logits of the main path's run, if the walk was still there. `computed`: those after the tokens of branches,
    [n, vocabulary], of which the last belong to the last tokens.
    """
    if main is not None:
        choice.answer(task, main, ())
    while (walk := walk_of(task)) is not None and walk.branch is not None:
        logits = next((rows for branch, rows in computed if branch is walk.branch), None)
        if logits is None:
            return  # the next step computes this branch
        fork, tokens = path_of(walk.branch)
        choice.answer(task, logits[walk.position - 1 - walk.branch.end :], tokens, fork)
    task.done = walk is None


def _leads_along(branch: Branch, other: Branch) -> bool:
    """Whether the branch is `other`, or leaves it, directly or by way of further branches."""
    each: Branch | None = branch
    while each is not None and each is not other:
        each = each.parent
    return each is not None
