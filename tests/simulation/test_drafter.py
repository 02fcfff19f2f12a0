"""The simulated drafter and the target's walk: they change a text in place, and leave it as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsi_actors.simulation.drafter import SimulatedDrafter
from dsi_actors.simulation.scripts import walk


def truth(text: Sequence[int]) -> int:
    return sum((place + 1) * token for place, token in enumerate(text)) % 3


class Guesses:
    """The first choice depends on all of the text; the second is another token."""

    def draft(self, tokens: Sequence[int]) -> int:
        return (truth(tokens) + (len(tokens) % 3 == 0)) % 3

    def alternative(self, tokens: Sequence[int]) -> int:
        return (self.draft(tokens) + 1) % 3


def told(drafter: SimulatedDrafter, texts: dict[int, tuple[int, ...]]) -> None:
    """Add the texts of what the drafter reports, by number."""
    first, tokens, parents = drafter.report()
    for place, token in enumerate(tokens):
        texts[first + place] = (*texts[parents[place] if parents else first + place - 1], token)


def drafted(prompt: Sequence[int], steps: int, rows: int) -> tuple[SimulatedDrafter, set[tuple[int, ...]]]:
    """A drafter after so many steps, and the texts of all that it has reported."""
    drafter, texts = SimulatedDrafter(Guesses()), {len(prompt) - 1: tuple(prompt)}
    assert not drafter.go_on(0, prompt, len(prompt))
    for _ in range(steps):
        drafter.step(rows, committed=0)
        told(drafter, texts)
    return drafter, set(texts.values())


@given(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=4), steps=st.integers(1, 6), rows=st.integers(1, 4))
def test_each_draft_follows_the_text_before_it(prompt: list[int], steps: int, rows: int) -> None:
    drafter, texts = drafted(prompt, steps, rows)
    for text in texts - {tuple(prompt)}:
        before = text[:-1]
        assert before in texts
        assert text[-1] in (Guesses().draft(before), Guesses().alternative(before))
    assert tuple(drafter.tokens) == max((text for text in texts if text == tuple(drafter.tokens[: len(text)])), key=len)


@pytest.mark.parametrize("base", [1, 2, 3])
def test_it_goes_on_from_a_branch(base: int) -> None:
    """The branch leaves the main path at position 3: it is told with more or less of the main path before it."""
    prompt = [1, 2, 0]
    drafter, texts = drafted(prompt, 4, 3)
    [branch] = [text for text in texts if len(text) == 4 and text != tuple(drafter.tokens[:4])]
    behind = max((text for text in texts if text[:4] == branch), key=len)
    assert len(behind) > 5
    assert drafter.go_on(base, branch[base:], 20)
    assert tuple(drafter.tokens) == behind
    first, tokens, parents = drafter.report()
    assert (first, tokens, parents) == (4, behind[4:], ())


def test_another_token_begins_anew() -> None:
    drafter, texts = drafted([1, 2, 0], 4, 2)
    missing = next(token for token in range(3) if (1, 2, 0, token) not in texts)
    assert not drafter.go_on(3, [missing], 20)
    assert drafter.tokens == [1, 2, 0, missing]


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=5), main=st.lists(st.integers(0, 2), max_size=4),
    branches=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=5), data=st.data(),
)  # fmt: skip
def test_a_walk_says_the_targets_own_tokens_and_leaves_the_text(
    text: list[int], main: list[int], branches: list[tuple[int, int]], data: st.DataObject
) -> None:
    tokens, parents = list(main), list(range(len(main)))
    known = {tuple(text[:length]) for length in range(1, len(text) + 1)}
    paths = [tuple(text), *(tuple(text + main[: place + 1]) for place in range(len(main)))]
    for parent, token in branches:
        parent = min(parent, len(tokens))
        path = (*paths[parent], token)
        if path not in paths:
            paths.append(path)
            tokens.append(token)
            parents.append(parent)
    known.update(paths)
    start = data.draw(st.integers(len(text), len(text) + (len(main) if len(tokens) == len(main) else 0)), label="start")
    before = list(text)
    answer = walk(truth, text, tokens, parents, start)
    assert text == before
    so_far = tuple([*text, *main][:start])
    for token in answer:
        assert token == truth(so_far)
        assert so_far in known, "along the tree, and one token beyond it"
        so_far = (*so_far, token)
    assert so_far not in known
