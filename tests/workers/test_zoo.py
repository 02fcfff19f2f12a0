"""A tiny model of each architecture: AR, SI and DSI give the same bits, and greedily the text of transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsi_protocol import SamplingParameters
from dsi_workers.engines import Engine, EngineError, Task, load_engine
from dsi_workers.session import Session
from support.engines import NoInterrupt
from support.zoo import KINDS, REFUSED, WORDS, make, table

PROMPT = [(7 * place * place + 3 * place + 5) % WORDS for place in range(310)]
TOKENS = 36
#: Those of the normal tests: experts with sinks and windows, latent attention.
SHORT = ("gpt_oss", "deepseek_v3")

Texts = tuple[list[int], list[float]]


def kinds(names: Sequence[str], *, short: Sequence[str] = SHORT) -> list[Any]:
    return [pytest.param(name, marks=() if name in short else pytest.mark.zoo) for name in names]


def load(directory: Path, role: str, **options: Any) -> Engine:
    wanted = {"max_length": 512, "calibrate": False, "slots": 3, **options}
    return load_engine("transformers", role=role, model=str(directory), device="cpu:0", options=wanted)


def opened(number: int, sampling: SamplingParameters, prompt: list[int] = PROMPT) -> Session:
    session = Session(number, len(prompt), "", sampling)
    session.write(0, prompt)
    return session


def plain(engine: Engine, sampling: SamplingParameters) -> Texts:
    """One token at a time."""
    session, logprobs = opened(1, sampling), list[float]()
    while len(logprobs) < TOKENS:
        answer = engine.verify(session, len(session.tokens), NoInterrupt())
        session.write(len(session.tokens), answer.tokens)
        logprobs += answer.logprobs
    engine.forget(session)
    return session.tokens[len(PROMPT) :], logprobs


def speculative(target: Engine, drafter: Engine, sampling: SamplingParameters) -> Texts:
    """Draft five tokens, then verify them, and so on."""
    checked, drafts, logprobs = opened(2, sampling), opened(2, sampling), list[float]()
    while len(logprobs) < TOKENS:
        known = len(PROMPT) + len(logprobs)
        for session in (checked, drafts):
            session.truncate(known)
        for _ in range(5):
            drafts.write(len(drafts.tokens), drafter.draft(drafts, 1, NoInterrupt()))
        checked.write(known, drafts.tokens[known:])
        logprobs += take(target, [Task(checked, known)])
        drafts.write(known, checked.tokens[known : len(PROMPT) + len(logprobs)])
    target.forget(checked)
    drafter.forget(drafts)
    return checked.tokens[len(PROMPT) :][:TOKENS], logprobs[:TOKENS]


def distributed(targets: Sequence[Engine], text: list[int], sampling: SamplingParameters) -> Texts:
    """Servers take turns to verify right and wrong drafts of any length. Other generations are in their forward passes."""
    chance = random.Random(4)
    sessions = [opened(3, sampling) for _ in targets]
    others = [opened(9, sampling, PROMPT[40:200]) for _ in targets]
    known, logprobs = PROMPT[:], list[float]()
    while len(logprobs) < TOKENS:
        server = chance.randrange(len(targets))
        session, other = sessions[server], others[server]
        begin = min(len(known), len(session.tokens))
        while session.tokens[:begin] != known[:begin]:
            begin -= 1
        session.truncate(begin)
        drafts = text[len(logprobs) :][: chance.randint(0, 11)]
        if drafts and chance.random() < 0.5:
            drafts[-1] = (drafts[-1] + 1) % WORDS
        session.write(begin, [*known[begin:], *drafts])
        other.write(len(other.tokens), [chance.randrange(WORDS) for _ in range(chance.randint(0, 3))])
        tasks = [Task(session, len(known)), Task(other, len(other.tokens))]
        logprobs += take(targets[server], tasks)
        known += tasks[0].answer.tokens
    for target, session, other in zip(targets, sessions, others, strict=True):
        target.forget(session)
        target.forget(other)
    return known[len(PROMPT) :][:TOKENS], logprobs[:TOKENS]


def take(engine: Engine, tasks: list[Task]) -> list[float]:
    """Do the tasks together. The first one's answer is written to its session. Returns its log probabilities."""
    while open_tasks := [task for task in tasks if not task.done]:
        engine.step(open_tasks, NoInterrupt())
    tasks[0].session.write(tasks[0].start, tasks[0].answer.tokens)
    return tasks[0].answer.logprobs


@pytest.mark.parametrize("name", kinds(list(KINDS)))
def test_all_algorithms_give_the_text_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(tmp_path, KINDS[name])
    targets = [load(tmp_path, "target"), load(tmp_path, "target")]
    drafter = load(tmp_path, "drafter")
    for sampling in (SamplingParameters(logprobs=True), SamplingParameters(temperature=0.8, seed=5, logprobs=True)):
        expected = plain(targets[0], sampling)
        assert speculative(targets[1], drafter, sampling) == expected
        assert distributed(targets, expected[0], sampling) == expected
        if sampling.greedy:
            prompt = torch.tensor([PROMPT])
            generated = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
            assert expected[0] == generated[0, len(PROMPT) :].tolist()


@pytest.mark.zoo
@pytest.mark.parametrize("name", list(KINDS))
def test_bits_in_half_precision_do_not_depend_on_groups(name: str, tmp_path: Path) -> None:
    make(tmp_path, KINDS[name])
    targets = [load(tmp_path, "target", dtype="bfloat16"), load(tmp_path, "target", dtype="bfloat16")]
    sampling = SamplingParameters(temperature=0.8, seed=5, logprobs=True)
    expected = plain(targets[0], sampling)
    assert distributed(targets, expected[0], sampling) == expected


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        *((name, "compute attention with code of their own, which this engine cannot make exact") for name in
          ("falcon", "gptj", "gpt_neo", "bloom", "codegen")),
        *((name, "keeps a running state that cannot be rewound when a draft is rejected") for name in
          ("mamba", "qwen3_next", "lfm2")),
        *((name, "otherwise than transformers does, and so would write another text") for name in ("bert", "roberta")),
        ("deepseek_v32", "has layers that choose in a way of their own which earlier tokens they read"),
        ("qwen3_vl_moe", "is a model for texts and images whose text part this engine cannot run alone"),
    ],
)  # fmt: skip
def test_others_are_refused_with_a_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    make(tmp_path, REFUSED[name])
    with pytest.raises(EngineError, match=sentence):
        load(tmp_path, "target")


def test_the_page_names_each_architecture() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert [name for name in (*KINDS, *REFUSED) if f"\n| `{name}` |" not in page] == []


@pytest.mark.zoo
def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page
