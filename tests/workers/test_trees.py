"""A target that verifies a tree gives what it gives for each path as a chain: the same tokens, and the same log probabilities to
the bit, which would show a difference in any logit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsi_workers.engine import RequestError
from dsi_workers.engines import Engine, Interrupted, Task, load_engine
from dsi_workers.sampling import Sampler
from dsi_workers.session import SamplingParameters, Session
from dsi_workers.tree import Branch, read_tree
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, torch_backend

WORDS = 90
PROMPT = [3, 14, 15, 9, 26]
GREEDY = SamplingParameters(logprobs=True)
SAMPLED = SamplingParameters(temperature=0.9, repetition_penalty=1.5, seed=3, logprobs=True)

Tree = tuple[Sequence[int], list[Branch]]
KINDS = ("timed", "float32", "bfloat16", "one slot", "sliding window", "transformers' layers")


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    kind: str = request.param
    if kind == "timed":
        return load_engine("timed", role="target", model="", device="cpu:0", options={"seed": 4})
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(directory, sliding_window=12 if kind == "sliding window" else None)
    if kind == "transformers' layers":
        from transformers import GPT2Config, GPT2LMHeadModel

        made = tmp_path_factory.mktemp("gpt2")
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=256, n_embd=32, n_layer=2, n_head=4)).save_pretrained(
            made
        )
        shutil.copy(directory / "tokenizer.json", made)
        directory = made
    options: dict[str, Any] = {"max_length": 256, "calibrate": False, "slots": 1 if kind == "one slot" else 8}
    options["dtype"] = "bfloat16" if kind == "bfloat16" else "float32"
    return load_engine("transformers", role="target", model=str(directory), device="cpu:0", options=options)


def opened(tokens: Sequence[int], sampling: SamplingParameters, generation: int = 1) -> Session:
    session = Session(generation, len(PROMPT), "", sampling)
    session.write(0, tokens)
    return session


def own_tokens(
    engine: Engine, prefix: Sequence[int], sampling: SamplingParameters, count: int
) -> list[tuple[int, float]]:
    """The model's own tokens after the prefix with their log probabilities, one verification for each."""
    session, found = opened(prefix, sampling, generation=99), list[tuple[int, float]]()
    for _ in range(count):
        answer = engine.verify(session, len(session.tokens), NoInterrupt())
        found += zip(answer.tokens, answer.logprobs, strict=True)
        session.write(len(session.tokens), answer.tokens)
    engine.forget(session)
    return found


def random_tree(chance: random.Random, base: int, own: Sequence[int], most: int) -> Tree:
    """A tree from position `base` on that has some of the model's own tokens, and others."""
    before, tokens, children = [-1], [-1], [list[int]()]  # node 0 is the token before the tree
    right = {0: 0}  # nodes whose path has the model's own tokens only, by how many they are
    for node in range(1, chance.randint(2, most) + 1):
        parent = node - 1 if chance.random() < 0.6 else chance.choice([*right, chance.randrange(node)])
        token, depth = chance.randrange(WORDS), right.get(parent)
        if depth is not None and depth < len(own) and chance.random() < 0.7:
            token = own[depth]
        if any(tokens[child] == token for child in children[parent]):
            token = next(t for t in range(WORDS) if all(tokens[child] != t for child in children[parent]))
        if depth is not None and depth < len(own) and token == own[depth]:
            right[node] = depth + 1
        before.append(parent)
        tokens.append(token)
        children.append([])
        children[parent].append(node)
    order = [0]
    while children[order[-1]]:
        order.append(chance.choice(children[order[-1]]))
    order += [node for node in range(len(tokens)) if node not in order]
    place = {node: number for number, node in enumerate(order)}
    return read_tree(base, [tokens[node] for node in order[1:]], [place[before[node]] for node in order[1:]])


def expected_of(own: Sequence[tuple[int, float]], tree: Tree, base: int) -> list[tuple[int, float]]:
    """The model's own tokens as far as the tree has them, and one more."""
    main, branches = tree
    paths = [list(main)]
    for branch in branches:
        path, fork = list(branch.tokens), branch.fork
        parent = branch.parent
        while parent is not None:
            path, fork, parent = [*parent.tokens[: fork - parent.fork], *path], parent.fork, parent.parent
        paths.append([*main[: fork - base], *path])
    shared = 0
    for path in paths:
        same = [token == mine for token, (mine, _) in zip(path, own, strict=False)]
        shared = max(shared, same.index(False) if False in same else len(same))
    return list(own[: shared + 1])


def finish(engine: Engine, task: Task) -> list[tuple[int, float]]:
    steps = 0
    while not task.done:
        engine.step([task], NoInterrupt())
        steps += 1
        assert steps < 20, "each step brings the answer nearer"
    return list(zip(task.answer.tokens, task.answer.logprobs, strict=True))


def verified(engine: Engine, session: Session, base: int, tree: Tree) -> list[tuple[int, float]]:
    session.write(base, tree[0])
    session.truncate(base + len(tree[0]))
    return finish(engine, Task(session, base, branches=tree[1]))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_a_path_of_a_tree_has_the_bits_of_a_chain(engine: Engine, sampling: SamplingParameters, seed: int) -> None:
    """One tree after another; and afterwards the main path has the bits of a chain, too."""
    chance = random.Random(seed)
    prompt = [*PROMPT, seed % WORDS]
    own = own_tokens(engine, prompt, sampling, 14)
    session, base = opened(prompt, sampling), len(prompt)
    for _ in range(3):
        done = base - len(prompt)
        tree = random_tree(chance, base, [token for token, _ in own[done:-1]], chance.choice([6, 20]))
        found = verified(engine, session, base, tree)
        assert found == expected_of(own[done:], tree, base)
        if chance.random() < 0.5:
            assert session.tokens == [*prompt, *(token for token, _ in own[:done]), *tree[0]]
            [after] = finish(engine, Task(session, len(session.tokens)))
            assert [after] == own_tokens(engine, session.tokens, sampling, 1)
        session.write(base, [token for token, _ in found])
        base += len(found)
        if base - len(prompt) >= len(own):
            break
    engine.forget(session)
