"""A target that verifies a tree gives what it gives for each path as a chain: the same tokens, and the same log probabilities to
the bit, which would show a difference in any logit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsi_protocol import SamplingParameters
from dsi_workers.engine import Answer, Interrupted, RequestError
from dsi_workers.engines import Engine, Task, load_engine
from dsi_workers.session import Session
from dsi_workers.tree import Branch, read_tree
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model

WORDS = 90
PROMPT = [3, 14, 15, 9, 26]
GREEDY = SamplingParameters(logprobs=True, top_logprobs=3)
SAMPLED = SamplingParameters(temperature=0.9, repetition_penalty=1.5, seed=3, logprobs=True, top_logprobs=2)

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
) -> list[tuple[int, Any]]:
    """The model's own tokens after the prefix with their log probabilities, one verification for each."""
    session, found = opened(prefix, sampling, generation=99), list[tuple[int, Any]]()
    for _ in range(count):
        answer = engine.verify(session, len(session.tokens), NoInterrupt())
        found += told(answer)
        session.write(len(session.tokens), answer.tokens)
    engine.forget(session)
    return found


def random_tree(chance: random.Random, base: int, own: Sequence[int], most: int) -> Tree:
    """A tree from position `base` on that has some of the model's own tokens, and others."""
    before, tokens, children = [-1], [-1], [list[int]()]  # node 0 is the token before the tree
    right = {0: 0}  # the node at the end of the model's own tokens, by how many tokens lead to it
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


def expected_of(own: Sequence[tuple[int, Any]], tree: Tree, base: int) -> list[tuple[int, Any]]:
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


def told(answer: Answer) -> list[tuple[int, Any]]:
    """Each token with its log probability, and the most probable tokens with theirs."""
    each = len(answer.top_tokens) // len(answer.tokens)
    tops = list(zip(answer.top_tokens, answer.top_logprobs, strict=True))
    return [
        (token, (logprob, tops[place * each : (place + 1) * each]))
        for place, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True))
    ]


def finish(engine: Engine, task: Task) -> list[tuple[int, Any]]:
    steps = 0
    while not task.done:
        engine.step([task], NoInterrupt())
        steps += 1
        assert steps < 20, "each step brings the answer nearer"
    return told(task.answer)


def verified(engine: Engine, session: Session, base: int, tree: Tree) -> list[tuple[int, Any]]:
    session.write(base, tree[0])
    session.truncate(base + len(tree[0]))
    return finish(engine, Task(session, base, branches=tree[1]))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("seed", range(6))
def test_trees_chains_and_prompts_share_forwards_and_keep_their_bits(engine: Engine, seed: int) -> None:
    """Several generations take steps together, in any company: a tree that needs several steps meets others in each."""
    chance = random.Random(seed)
    number = min(3, engine.info.slots)
    prompts = [[*PROMPT, *(chance.randrange(WORDS) for _ in range(chance.choice([0, 4, 140])))] for _ in range(number)]
    sessions, expected, own = list[Session](), list[list[tuple[int, Any]]](), list[list[tuple[int, Any]]]()
    for generation, prompt in enumerate(prompts, start=1):
        sampling = GREEDY if generation == 1 else SAMPLED
        session = Session(generation, len(prompt), "", sampling)
        session.write(0, prompt)
        sessions.append(session)
        alone = Session(50, len(prompt), "", sampling)
        alone.write(0, prompt)
        own.append([])
        for _ in range(12):
            said = engine.verify(alone, len(alone.tokens), NoInterrupt())
            alone.write(len(alone.tokens), said.tokens)
            own[-1] += told(said)
        engine.forget(alone)
    tasks = list[Task]()
    for session, prompt, truth in zip(sessions, prompts, own, strict=True):
        tree = random_tree(chance, len(prompt), [token for token, _ in truth[:-1]], 16)
        if chance.random() < 0.2:
            tree = (tree[0], [])
        session.write(len(prompt), tree[0])
        tasks.append(Task(session, len(prompt), branches=tree[1]))
        expected.append(expected_of(truth, tree, len(prompt)))
    steps = 0
    while left := [task for task in tasks if not task.done]:
        engine.step(chance.sample(left, chance.randint(1, len(left))), NoInterrupt())
        steps += 1
        assert steps < 60
    for task, answer in zip(tasks, expected, strict=True):
        assert told(task.answer) == answer
        engine.forget(task.session)


def test_an_interrupt_within_a_tree_leaves_no_trace(engine: Engine) -> None:
    """Whatever was computed of branches, the next verification has the bits that it has in a fresh session."""
    own = own_tokens(engine, PROMPT, SAMPLED, 12)
    words = [token for token, _ in own]
    wrong = [(token + 1) % WORDS for token in words]
    base, interrupted = len(PROMPT), 0
    branches = [Branch(base + 1, None, words[1:9]), Branch(base + 2, None, wrong[2:5])]
    tree = [words[0], *wrong[1:5]], branches
    session = opened(PROMPT, SAMPLED)
    for checks in range(9):
        session.write(base, tree[0])
        task = Task(session, base, branches=branches)
        interrupt = InterruptAfter(checks)
        try:
            while not task.done:
                engine.step([task], interrupt)
        except Interrupted:
            interrupted += 1
        [after] = finish(engine, Task(session, base + 1 + checks % 4))[:1]
        tokens = session.tokens[: base + 1 + checks % 4]
        assert [after] == own_tokens(engine, tokens, SAMPLED, 1)
        assert verified(engine, session, base, tree) == own[:10]
        session.truncate(base + checks % 2)
    assert interrupted or engine.info.window == 32, "the timed engine looks up only where it waits"
    engine.forget(session)


def test_a_slot_that_another_generation_takes_between_two_steps(engine: Engine) -> None:
    """The tree's own generation computes again what it had, and then the branch that its answer is on."""
    own = own_tokens(engine, PROMPT, GREEDY, 12)
    words, base = [token for token, _ in own], len(PROMPT)
    session = opened([*PROMPT, words[0], (words[1] + 1) % WORDS], GREEDY)
    task = Task(session, base, branches=[Branch(base, None, [words[0] + 1]), Branch(base + 1, None, words[1:8])])
    others = [
        opened([*PROMPT, 5, number], GREEDY, generation=10 + number) for number in range(min(8, engine.info.slots))
    ]
    engine.step([task], NoInterrupt())
    for other in others:
        engine.verify(other, len(other.tokens), NoInterrupt())
    assert finish(engine, task) == own[:9]
    for each in (session, *others):
        engine.forget(each)


def test_a_tree_that_fits_takes_one_forward(engine: Engine) -> None:
    prefix = [*PROMPT, 7]  # a chunk of the prompt has a forward of its own
    own = own_tokens(engine, prefix, GREEDY, 9)
    words, base = [token for token, _ in own], len(prefix)
    session = opened(prefix, GREEDY)
    engine.verify(session, base, NoInterrupt())
    before = engine.forwards
    tree = (
        [words[0], (words[1] + 1) % WORDS],
        [Branch(base + 1, None, words[1:4]), Branch(base + 1, None, [words[0]] * 3)],
    )
    assert verified(engine, session, base, tree) == own[:5]
    assert engine.forwards == before + 1
    engine.forget(session)


def test_a_tree_as_large_as_a_target_takes(engine: Engine) -> None:
    """One branch that fills a forward by itself, or nearly, and is on the answer's path."""
    length = min(engine.info.rows, 80) - 1
    own = own_tokens(engine, PROMPT, GREEDY, length + 1)
    words, base = [token for token, _ in own], len(PROMPT)
    session = opened(PROMPT, GREEDY)
    assert verified(engine, session, base, ([(words[0] + 1) % WORDS], [Branch(base, None, words[:length])])) == own
    engine.forget(session)


def test_a_branch_within_the_prompt_is_refused(engine: Engine) -> None:
    """The bits of a prompt depend on how long it is, and a branch would change that."""
    session = opened([*PROMPT, 1], GREEDY)
    if engine.info.window == 8:
        with pytest.raises(RequestError, match="a branch leaves the main path within the prompt"):
            engine.step([Task(session, 3, branches=[Branch(4, None, [2])])], NoInterrupt())
    engine.forget(session)
