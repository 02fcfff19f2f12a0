"""The sampler: noise equal to its definition bit for bit, right in law, transformers' meaning of every parameter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import logits_process as library

from dsi_protocol import SamplingParameters
from dsi_protocol.gumbel import GAMMA, gumbel, stream_key
from dsi_workers.logit_changes import LogitChanges, apply_repetition_penalty
from dsi_workers.sampling import Sampler, filter_scores, gumbel_noise, log_probabilities
from dsi_workers.session import Session
from support.engines import make_tiny_model

U64 = st.integers(0, 2**64 - 1)


def sampler(parameters: SamplingParameters, tokens: Sequence[int]) -> Sampler:
    """Of a session with these tokens."""
    session = Session(1, 1, "", parameters)
    session.write(0, tokens)
    return Sampler(session)


@settings(max_examples=300)
@given(
    seed=U64, position=st.integers(0, 2**32 - 1), tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
)
def test_the_noise_is_its_definition_bit_for_bit(seed: int, position: int, tokens: list[int]) -> None:
    noise = gumbel_noise(stream_key(seed, position), torch.tensor(tokens))
    assert noise.tolist() == [gumbel(seed, position, token) for token in tokens]


PROBABILITIES = torch.tensor([0.31, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.03, 0.02, 0.006, 0.003, 0.001])
DRAWS = 20_000
#: A sampler's own choices are held against the noise of as many draws.
CHOICES = 300


def noise_of(keys: Sequence[int], tokens: int) -> torch.Tensor:
    """The noise of tokens 0, 1, ... in each of these streams, [keys, tokens], in one call.

    Token t of the stream with the state k has the bits of token t + k / GAMMA of the stream with the state 0, modulo 2^64.
    """
    inverse = pow(GAMMA, -1, 2**64)
    begins = [(key * inverse + 2**63) % 2**64 - 2**63 for key in keys]
    return gumbel_noise(0, torch.tensor(begins)[:, None] + torch.arange(tokens))


def chi_square(choices: torch.Tensor) -> float:
    """Of the counts of DRAWS draws against PROBABILITIES; 11 degrees of freedom: 50 is exceeded once in 1.6 million."""
    counts = choices.bincount(minlength=len(PROBABILITIES))
    expected = DRAWS * PROBABILITIES.double()
    assert counts.sum() == DRAWS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_sampler_is_right_in_law(over: str) -> None:
    places = [(number, 17) if over == "seeds" else (0, number) for number in range(DRAWS)]
    noise = noise_of([stream_key(seed, position) for seed, position in places], len(PROBABILITIES))
    drawn = (PROBABILITIES.log().double() + noise).argmax(dim=1)
    assert chi_square(drawn) < 50
    logits = PROBABILITIES.log() + 3.0
    for (seed, position), token in zip(places[:CHOICES], drawn.tolist(), strict=False):
        assert sampler(SamplingParameters(temperature=1.0, seed=seed), [1]).choose(logits, position) == token


@pytest.mark.parametrize("fault", ["noise of half the size", "uniform noise", "one token's noise too large"])
def test_a_wrong_sampler_would_be_noticed(fault: str) -> None:
    noise = noise_of([stream_key(seed, 17) for seed in range(DRAWS)], len(PROBABILITIES))
    match fault:
        case "noise of half the size":
            noise = noise / 2
        case "uniform noise":
            noise = torch.exp(-torch.exp(-noise)) * 3
        case _:
            noise[:, 0] += 0.1
    assert chi_square((PROBABILITIES.log().double() + noise).argmax(dim=1)) > 50


def test_draws_at_successive_positions_and_of_neighbour_seeds_are_independent() -> None:
    """Pairs of draws fill the 2 x 2 table of a fair coin as independent ones do."""
    logits = torch.zeros(2)
    drawn = []
    for seed in (5, 6):
        drawn.append(noise_of([stream_key(seed, position) for position in range(8000)], 2).argmax(dim=1).tolist())
        made = sampler(SamplingParameters(temperature=1.0, seed=seed), [1])
        assert [made.choose(logits, position) for position in range(CHOICES)] == drawn[-1][:CHOICES]
    mine, theirs = drawn
    for pairs in (Counter(itertools.pairwise(mine)), Counter(zip(mine, theirs, strict=True))):
        assert all(abs(pairs[i, j] - 2000) < 250 for i in (0, 1) for j in (0, 1)), pairs


WORDS = 64
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.5, "top_p": 0.6, "min_p": 0.2},
]
#: What Sampling accepts, and what makes trouble in float32: denormal, tiny, and the ends.
temperatures = st.one_of(st.sampled_from([0.0, 5e-324, 1e-39, 1e-6, 1.0, 1000.0]), st.floats(0, 1000))
penalties = st.one_of(st.sampled_from([0.001, 1.0, 1000.0]), st.floats(0.001, 1000))
shares = st.one_of(st.sampled_from([5e-324, 1e-39, 1e-10, 1.0]), st.floats(0, 1, exclude_min=True))
any_parameters = st.builds(
    SamplingParameters,
    temperatures,
    st.one_of(st.just(0), st.integers(1, 2 * WORDS), st.just(2**32 - 1)),
    shares,
    st.one_of(st.just(0.0), shares),
    penalties,
    U64,
)


@st.composite
def some_logits(draw: st.DrawFn) -> torch.Tensor:
    """Of a model that works: with ties, and with tokens that it excludes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(WORDS, generator=generator) * draw(st.sampled_from([0.01, 1.0, 3.0, 30.0]))
    logits += draw(st.sampled_from([-100.0, 0.0, 100.0]))
    if draw(st.booleans()):
        logits = logits.bfloat16().float()
    excluded = draw(st.lists(st.integers(0, WORDS - 1), max_size=WORDS - 1))
    logits[excluded] = -torch.inf
    return logits


def by_the_library(logits: torch.Tensor, prefix: list[int], parameters: SamplingParameters) -> torch.Tensor:
    """In the order in which its own `generate` applies them (test_the_library_has_this_order)."""
    processors: list[Any] = []
    if parameters.repetition_penalty != 1:
        processors.append(library.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    if parameters.temperature != 1:
        processors.append(library.TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        processors.append(library.TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1:
        processors.append(library.TopPLogitsWarper(parameters.top_p))
    if parameters.min_p > 0:
        processors.append(library.MinPLogitsWarper(parameters.min_p))
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([prefix]), scores)
    return scores[0]


def by_us(logits: torch.Tensor, prefix: list[int], parameters: SamplingParameters) -> torch.Tensor:
    said = torch.zeros(WORDS, dtype=torch.bool)
    said[prefix] = True
    scores = (
        apply_repetition_penalty(logits, said, parameters.repetition_penalty)
        if parameters.repetition_penalty != 1
        else logits
    )
    return filter_scores(scores, parameters)


@pytest.mark.parametrize("values", PARAMETERS, ids=lambda values: "+".join(values))
def test_the_library_has_this_order(values: dict[str, Any]) -> None:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    values = {"temperature": 1.0, "top_k": 0, **values}
    settings = GenerationConfig(do_sample=True, **values)
    theirs = model._get_logits_processor(settings, input_ids_seq_length=6, encoder_input_ids=None)
    logits = torch.randn(WORDS, generator=torch.Generator().manual_seed(3)) * 3
    prefix = [3, 1, 4, 1, 5, 9]
    expected = theirs(torch.tensor([prefix]), logits[None].clone())[0]
    assert torch.equal(by_the_library(logits, prefix, SamplingParameters(**values)), expected)


@settings(max_examples=400, deadline=None)
@given(
    logits=some_logits(),
    parameters=any_parameters.filter(lambda parameters: not parameters.greedy),
    prefix=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=20),
)
def test_parameters_mean_what_they_mean_in_transformers(
    logits: torch.Tensor, parameters: SamplingParameters, prefix: list[int]
) -> None:
    """The same tokens stay possible, with the same scores, bit for bit."""
    expected = by_the_library(logits, prefix, parameters)
    assert torch.equal(by_us(logits, prefix, parameters), expected)
    assert bool(expected[sampler(parameters, prefix).choose(logits, len(prefix))] > -torch.inf)


strange = st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, -1.0, 1.0])


@settings(max_examples=400, deadline=None)
@given(
    logits=st.one_of(
        st.lists(strange, min_size=1, max_size=12),
        st.builds(lambda value, many: [value] * many, strange, st.integers(1, 12)),
        st.lists(st.floats(-(2.0**126), -(2.0**-126), width=32), min_size=1, max_size=12),
        st.lists(st.floats(width=32), min_size=1, max_size=12),
    ),
    parameters=any_parameters,
    data=st.data(),
)
def test_whatever_the_logits_the_choice_is_a_token(
    logits: list[float], parameters: SamplingParameters, data: st.DataObject
) -> None:
    prefix = data.draw(st.lists(st.integers(0, len(logits) + 3), min_size=1, max_size=5))  # some have no logit
    assert not parameters.problem
    made = torch.tensor(logits)
    token = sampler(parameters, prefix).choose(made, len(prefix))
    assert 0 <= token < len(logits)
    assert math.isfinite(log_probabilities(made)[token])
    greatest = [place for place, value in enumerate(logits) if value == max(logits)]
    if parameters.plain_greedy and not any(map(math.isnan, logits)):
        assert token == greatest[0]


@pytest.mark.parametrize("temperature", [1e-39, 1e-7])
def test_a_temperature_of_nearly_0_is_greedy(temperature: float) -> None:
    logits = torch.tensor([-5.0, -1.0, -3.0])
    assert sampler(SamplingParameters(temperature=temperature, seed=3), [0]).choose(logits, 1) == 1


def test_greedy_with_a_penalty_takes_the_largest_penalised_logit() -> None:
    parameters = SamplingParameters(repetition_penalty=2.0)
    assert sampler(parameters, [0]).choose(torch.tensor([3.0, 2.0, 1.0]), 1) == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_penalty_is_on_what_stands_before_however_the_text_changed(data: st.DataObject) -> None:
    words = st.integers(0, 9)
    parameters = SamplingParameters(repetition_penalty=3.0)
    session = Session(1, 1, "", parameters)
    session.write(0, data.draw(st.lists(words, min_size=1, max_size=6)))
    made = Sampler(session)
    logits = torch.linspace(1.0, 2.0, 10)
    for _ in range(data.draw(st.integers(1, 8))):
        base = data.draw(st.integers(1, len(session.tokens)))
        if data.draw(st.booleans()):
            session.truncate(base)
        session.write(base, data.draw(st.lists(words, max_size=5)))
        guess = data.draw(st.lists(words, max_size=3))
        position = data.draw(st.integers(1, len(session.tokens) + len(guess)))
        before = [*session.tokens, *guess][:position]
        assert made.choose(logits, position, guess) == sampler(parameters, before).choose(logits, position)
        fork = data.draw(st.integers(1, len(session.tokens)))
        position = data.draw(st.integers(1, fork + len(guess)))
        before = [*session.tokens[:fork], *guess][:position]
        assert made.choose(logits, position, guess, fork) == sampler(parameters, before).choose(logits, position)


def changed_by_hand(logits: torch.Tensor, text: list[int], parameters: SamplingParameters) -> torch.Tensor:
    """As section 7 of the specification has it, from the whole text. The prompt is its first two tokens."""
    scores = [float(value) for value in logits]
    answer = text[2:]
    bad = {word[-1] for word in parameters.bad_words if answer[len(answer) - len(word) + 1 :] == list(word[:-1])}
    stops = set(parameters.stop_tokens) if len(text) - 2 < parameters.min_tokens else set()
    for tokens in (bad, stops):
        left = [-math.inf if token in tokens else score for token, score in enumerate(scores)]
        scores = left if max(left) > -math.inf else scores
    made = torch.tensor(scores)
    for token, bias in zip(parameters.biased_tokens, parameters.biases, strict=True):
        if token < len(made):
            made[token] += bias
    for token in set(text) & set(range(len(made))):
        made[token] = made[token] * 1.5 if made[token] < 0 else made[token] / 1.5
    for token, count in Counter(answer).items():
        if token < len(made):
            made[token] = made[token] - parameters.frequency_penalty * torch.tensor(float(count))
            made[token] = made[token] - parameters.presence_penalty
    return made


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_logits_change_as_the_specification_says_however_the_text_changed(data: st.DataObject) -> None:
    """In chains and trees: whatever is committed, guessed, or on a branch, the text before the row alone counts."""
    words = st.integers(0, 11)  # two more than there are logits
    halves = st.sampled_from([-1.5, -0.5, 0.0, 0.25, 2.0])
    biased = data.draw(st.lists(words, unique=True, max_size=4))
    parameters = SamplingParameters(
        repetition_penalty=1.5, presence_penalty=data.draw(halves), frequency_penalty=data.draw(halves),
        biased_tokens=tuple(biased), biases=tuple(data.draw(halves) for _ in biased),
        bad_words=tuple(data.draw(st.lists(st.lists(words, min_size=1, max_size=3).map(tuple), max_size=4))),
        min_tokens=data.draw(st.integers(0, 6)), stop_tokens=tuple(data.draw(st.lists(words, max_size=12))),
    )  # fmt: skip
    session = Session(1, 2, "", parameters)
    session.write(0, data.draw(st.lists(words, min_size=2, max_size=6)))
    changes = LogitChanges(session)
    logits = torch.randn(10, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    for _ in range(data.draw(st.integers(1, 6))):
        base = data.draw(st.integers(2, len(session.tokens)))
        if data.draw(st.booleans()):
            session.truncate(base)
        session.write(base, data.draw(st.lists(words, max_size=5)))
        guess = data.draw(st.lists(words, max_size=3))
        end = data.draw(st.integers(2, len(session.tokens)))
        position = data.draw(st.integers(2, end + len(guess)))
        text = [*session.tokens[:end], *guess][:position]
        assert torch.equal(
            changes.apply(logits.clone(), position, guess, end), changed_by_hand(logits, text, parameters)
        )


def test_penalties_are_on_the_answer_alone() -> None:
    session = Session(1, 2, "", SamplingParameters(frequency_penalty=1.0, presence_penalty=0.5))
    session.write(0, [0, 0, 1, 1])
    assert LogitChanges(session).apply(torch.zeros(3), 4, (), 4).tolist() == [0.0, -2.5, 0.0]


def test_an_answer_goes_on_where_every_token_is_forbidden() -> None:
    parameters = SamplingParameters(bad_words=((0,), (1,)), min_tokens=5, stop_tokens=(0, 1))
    assert sampler(parameters, [0]).choose(torch.tensor([1.0, 2.0]), 1) == 1


def test_a_token_costs_as_much_after_a_long_text_as_after_a_short_one() -> None:
    """Counted in looks at the text."""

    class Counted(list[int]):
        looks = 0

        def __getitem__(self, place: Any) -> Any:
            type(self).looks += len(range(*place.indices(len(self)))) if isinstance(place, slice) else 1
            return super().__getitem__(place)

        def __iter__(self) -> Iterator[int]:
            type(self).looks += len(self)
            return super().__iter__()

    def looks_after(length: int) -> int:
        session = Session(
            1, length, "", SamplingParameters(temperature=0.8, repetition_penalty=1.2, bad_words=((1, 2),))
        )
        session.tokens = Counted(number % WORDS for number in range(length))
        made, logits = Sampler(session), torch.zeros(WORDS)
        made.choose(logits, length)
        Counted.looks = 0
        for number in range(10):
            have = len(session.tokens)
            session.write(have, [number, number + 1])
            for position in (have, have + 1, have + 2):
                made.choose(logits, position, [5, 6])
            session.truncate(have + 1)
        return Counted.looks

    assert looks_after(20_000) == looks_after(20) < 200


def test_a_sampled_request_imports_nothing(tmp_path: Path) -> None:
    """What takes seconds belongs to loading: in a step it would keep a cancel waiting."""
    program = """
import sys
from dsi_workers.engines import Task, load_engine
from dsi_protocol import SamplingParameters
from dsi_workers.session import Session
from support.engines import NoInterrupt
for role, options in (("target", {}), ("drafter", {}), ("drafter", {"lookup": True})):
    options["calibrate"] = False
    engine = load_engine("transformers", role=role, model=sys.argv[1], device="cpu:0", options=options)
    before = set(sys.modules)
    session = Session(1, 3, "", SamplingParameters(0.8, 20, 0.9, 0.05, 1.2, 7, logprobs=True))
    session.write(0, [1, 2, 3, 1, 2, 3])
    for count in (None,) if role == "target" else (3, 3):
        task = Task(session, 3 if count is None else len(session.tokens), count)
        while not task.done:
            engine.step([task], NoInterrupt())
        assert task.answer.tokens
        session.write(len(session.tokens), task.answer.tokens)
    print(role, options, sorted(set(sys.modules) - before))
assert "transformers" not in sys.modules
"""
    command = [sys.executable, "-c", program, str(make_tiny_model(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("target", "drafter"))]
    assert len(said) == 3
    assert all(line.endswith("[]") for line in said), said


@settings(max_examples=6)
@given(st.integers(0, 10**6))
def test_two_that_share_the_noise_agree_as_often_as_theory_says(number: int) -> None:
    """Between (1 - TV) / (1 + TV), the guarantee of the coupling, and 1 - TV, the most any coupling reaches."""
    generator = torch.Generator().manual_seed(number)
    target = torch.randn(30, generator=generator) * 2
    drafter = target + torch.randn(30, generator=generator) * 0.5
    distance = float((target.softmax(0) - drafter.softmax(0)).abs().sum() / 2)
    draws = 2000
    noise = noise_of([stream_key(number, position) for position in range(draws)], 30)
    agreed = int(((target + noise).argmax(dim=1) == (drafter + noise).argmax(dim=1)).sum())
    slack = 6 * 0.5 / draws**0.5  # six standard errors: a false alarm in fewer than one of 20 million runs
    assert (1 - distance) / (1 + distance) - slack <= agreed / draws <= 1 - distance + slack
