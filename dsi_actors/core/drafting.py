"""The drafters of one generation: what each is asked, and from where it goes on.

There may be several, each with a path of its own through the tree of drafts (drafter_view.py). The rules:

* **Each drafter goes on by itself**: behind its own drafts as long as its path is alive, else behind the deepest draft of its own
  on the main path, else behind the committed tokens. So what one drafter says is worth something where another one is wrong. A
  drafter that is alone goes on behind the main path, whoever drafted it.
* **The leader's path is the main path** where it has drafted: of all drafters, the one with the lowest rank. Until its drafts
  come, the main path is what others said; where it says something else then, what they said becomes an alternative.
* **The leader sets the pace of verifications**, and the others' drafts are verified along with its own: a fast drafter that is
  rarely right would keep the servers busy otherwise, and a slow one would be waited for. While the leader has nothing to come,
  and all that came is verified, the next one in rank takes its place.
* Drafts that are equal are one node of the tree, whoever made them.
* **Astray** is a drafter whose path has died: another token was committed. It is asked anew, and the others go on as they were.
* A drafter that is lost leaves its drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsi_actors.core.actions import Action, CancelDrafts, StartDraft
from dsi_actors.core.drafter_view import DrafterView, DraftRequest
from dsi_actors.core.policy import Policy
from dsi_actors.core.tree import DraftTree, Node


class Drafting:
    """All drafters of one generation. `tokens`: the committed ones and the main path, kept by the caller. `act` is told what
    drafters shall do, `on_late` whether a first choice was right that came after its position had been committed."""

    def __init__(
        self,
        tree: DraftTree,
        tokens: list[int],
        *,
        take_attempt: Callable[[], int],
        act: Callable[[Action], None],
        on_late: Callable[[bool], None],
    ) -> None:
        self._tree = tree
        self._tokens = tokens
        self._take_attempt = take_attempt
        self._act = act
        self._on_late = on_late
        #: By number; the leader first.
        self._views: dict[int, DrafterView] = {}
        #: Whether no drafter had a draft to add when the last token was committed, as prompt lookup where nothing repeats.
        self.had_nothing = False

    @property
    def several(self) -> bool:
        return len(self._views) > 1

    @property
    def coming(self) -> bool:
        """Whether drafts are on their way, beyond those that came."""
        return any(map(self.has_more_to_come, self._views.values()))

    @property
    def views(self) -> list[DrafterView]:
        """The leader first."""
        return list(self._views.values())

    def leads(self, drafter: int) -> bool:
        return drafter == next(iter(self._views), None)

    def front(self, view: DrafterView) -> int:
        """One past the last position that it has drafted, or that is committed."""
        return view.end.position + 1 if self._is_ahead(view) else self._committed

    def has_more_to_come(self, view: DrafterView) -> bool:
        return bool(view.requests) and view.asked_to > self.front(view)

    def acceptance(self, drafter: int) -> tuple[int, int]:
        """Of the first choices of a drafter that is there, those that were compared with the target's own tokens, and those that
        were equal."""
        view = self._views[drafter]
        return view.judged, view.accepted

    def is_beside(self, view: DrafterView) -> bool:
        """Whether its path is alive and leaves the main path. Not where there is one drafter."""
        return self.several and self._is_ahead(view) and not self._is_in_text(view.end)

    @property
    def beside(self) -> list[DrafterView]:
        return [view for view in self._views.values() if self.is_beside(view)] if self.several else []

    # What happened

    def joined(self, drafter: int, rank: int, rows: int) -> None:
        view = DrafterView(drafter, rank, rows, self._tree, self._judge_late)
        views = [*(other for other in self._views.values() if other.number != drafter), view]
        self._views = {each.number: each for each in sorted(views, key=lambda each: each.rank)}

    def lost(self, drafter: int) -> None:
        self._views.pop(drafter, None)

    def is_live(self, drafter: int, attempt: int) -> bool:
        return drafter in self._views and attempt in self._views[drafter].requests

    def arrived(self, drafter: int, attempt: int, start: int, tokens: Sequence[int], parents: Sequence[int]) -> bool:
        """Of a live attempt. False if the drafts cannot stand where they say: what came in between was lost, so what follows
        stands on nothing we know. Go on without this drafter until the next commit, or one that always errs would keep us
        waiting."""
        view = self._views[drafter]
        if not view.add(start, tokens, parents, view.requests[attempt].end):
            view.exhausted = True
            self._cancel(view)
            return False
        if not view.astray:
            view.held = view.end.position + 1
        elif not view.drafted(self._behind(view)):
            self._cancel(view)  # it goes on behind a token that the target has contradicted since
        return True

    def ended(self, drafter: int, attempt: int, *, complete: bool, held: int | None) -> None:
        """Of a live attempt."""
        view = self._views[drafter]
        request = view.requests.pop(attempt)
        if held is not None:
            view.held = min(view.held, held)  # it lost its prefix: send that again
            self._cancel(view)
        elif not complete or view.held < request.end:
            view.exhausted = True
            self._cancel(view)
        else:  # and so are those before it, though their ends are still to come
            for earlier in [number for number in view.requests if number < attempt]:
                del view.requests[earlier]

    def judge(self, token: int) -> None:
        """The target's own token follows the root, which has not moved yet."""
        for view in self._views.values():
            view.judge(token)

    def root_moved(self) -> None:
        """The root has moved, or all drafts were dropped. A drafter whose path has died still holds what was committed before."""
        for view in self._views.values():
            if view.astray:
                view.held = min(view.held, self._tree.root.position)

    def committed(self) -> None:
        """The root has moved as far as it does for now."""
        self.had_nothing = all(view.exhausted for view in self._views.values())
        for view in self._views.values():
            view.exhausted = False
            if view.requests and view.asked_to <= self._committed:
                self._cancel(view)  # it fell behind altogether: let it skip ahead

    # What to do next

    def plan(self, policy: Policy, end: int) -> None:
        """Keep each drafter busy, `max_ahead` beyond the committed tokens and never past the last useful position, that before
        `end`."""
        for view in self._views.values():
            if not view.exhausted:
                self._plan(view, policy, min(self._committed + policy.max_ahead, end - 1))

    def cancel_all(self) -> None:
        for view in self._views.values():
            self._cancel(view)

    def _plan(self, view: DrafterView, policy: Policy, limit: int) -> None:
        astray = bool(view.requests) and view.astray
        behind = self._behind(view)
        front = view.asked_to if view.requests and not astray else behind.position + 1
        if front >= limit:
            if astray:
                self._cancel(view)
            return
        rows = min(policy.rows, view.rows)
        tokens: tuple[int, ...] = ()
        if astray and rows > 1:
            view.requests.clear()  # the next request says where it goes on, and ends those before it
        elif astray:
            self._cancel(view)
        if view.requests:
            # Extend a running plan well before it runs out, but not by one token at each commit; and not while the
            # drafter is behind, where more of the same plan is of no use.
            remaining = front - view.held
            enough = remaining > max(policy.lookahead, policy.max_ahead // 2)
            branches_are_dead = policy.rows > 1 and self._committed - view.heard >= policy.lookahead
            if view.held < self._committed or (enough and not branches_are_dead):
                return
            base = min(view.held, self._fork(view.end).position + 1)
        else:  # it is told all that it goes on from, and numbers what it drafts from there on
            base, tokens = self._told(view, behind)
            view.restart(behind)
        wait = self._committed + policy.first_wait
        if front < wait < limit and policy.first_wait != policy.lookahead:
            # What the first verification waits for comes in one block, and no later than it is complete.
            self._start(view, base, tokens, front, wait, wait - front, rows)
            base, tokens, front = self._fork(view.end).position + 1, (), wait
        self._start(view, base, tokens, front, limit, policy.lookahead, rows)

    def _start(
        self, view: DrafterView, base: int, tokens: tuple[int, ...], start: int, end: int, block: int, rows: int
    ) -> None:
        attempt = self._take_attempt()
        view.requests[attempt] = DraftRequest(start, end)
        view.heard = self._committed
        self._act(StartDraft(attempt, base, tokens, start, end - start, block, rows, self._committed, view.number))

    def _cancel(self, view: DrafterView) -> None:
        if view.requests:
            self._act(CancelDrafts(max(view.requests), view.number))
            view.requests.clear()

    def _judge_late(self, view: DrafterView, right: bool) -> None:
        view.count(right)
        if self.leads(view.number):
            self._on_late(right)

    # Places in the tree

    @property
    def _committed(self) -> int:
        return self._tree.root.position + 1

    def _is_ahead(self, view: DrafterView) -> bool:
        """Whether its path is alive and leads to the root or beyond."""
        return view.end.live and view.end.position >= self._tree.root.position

    def _behind(self, view: DrafterView) -> Node:
        """Where the drafter goes on when it is told."""
        ahead = self._is_ahead(view)
        if not self.several and not (ahead and not self._is_in_text(view.end)):
            return self._tree.main_end
        if ahead:
            return view.end
        found = self._tree.root
        for node in self._tree.main:
            if view.rank not in node.drafted_by:
                break
            found = node
        return found

    def _told(self, view: DrafterView, behind: Node) -> tuple[int, tuple[int, ...]]:
        """(base, tokens): what it is told of the text up to and with a node."""
        fork = self._fork(behind)
        base = min(view.held, fork.position + 1)
        aside = self._tree.path_to(behind)[fork.position + 1 - self._committed :] if behind is not fork else []
        return base, (*self._tokens[base : fork.position + 1], *(node.token for node in aside))

    def _fork(self, node: Node) -> Node:
        """The last node of the text on the path to this live node."""
        while not self._is_in_text(node):
            assert node.parent is not None
            node = node.parent
        return node

    def _is_in_text(self, node: Node) -> bool:
        """Whether a live node is committed, or on the main path."""
        place = node.position - self._committed
        return place < 0 or (place < len(self._tree.main) and self._tree.main[place] is node)

    # Under test

    def check(self, end: int) -> None:
        """Assert the invariants."""
        for view in self._views.values():
            assert view.held <= max(self.front(view), len(self._tokens))
            expected = None
            for request in view.requests.values():
                assert expected is None or request.start == expected, "live draft attempts are contiguous"
                assert request.start < request.end <= end - 1
                expected = request.end

    @property
    def idle(self) -> bool:
        return not any(view.requests for view in self._views.values())
