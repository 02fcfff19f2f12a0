"""The sampler: noise equal to its definition bit for bit, right in law, transformers' meaning of every parameter."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from dsi_protocol.gumbel import gumbel, stream_key
from dsi_workers.sampling import Sampler, gumbel_noise
from dsi_workers.session import SamplingParameters

U64 = st.integers(0, 2**64 - 1)


@settings(max_examples=300)
@given(
    seed=U64, position=st.integers(0, 2**32 - 1), tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
)
def test_the_noise_is_its_definition_bit_for_bit(seed: int, position: int, tokens: list[int]) -> None:
    noise = gumbel_noise(stream_key(seed, position), torch.tensor(tokens))
    assert noise.tolist() == [gumbel(seed, position, token) for token in tokens]


PROBABILITIES = torch.tensor([0.31, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.03, 0.02, 0.006, 0.003, 0.001])
DRAWS = 20_000


def chi_square(draw: Callable[[int], int]) -> float:
    """Of the counts of DRAWS draws against PROBABILITIES; 11 degrees of freedom: 50 is exceeded once in 1.6 million."""
    counts = Counter(draw(number) for number in range(DRAWS))
    expected = [DRAWS * float(probability) for probability in PROBABILITIES]
    return sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected))


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_sampler_is_right_in_law(over: str) -> None:
    logits = PROBABILITIES.log() + 3.0
    samplers = [
        Sampler(SamplingParameters(temperature=1.0, seed=seed)) for seed in range(DRAWS if over == "seeds" else 1)
    ]
    if over == "seeds":
        statistic = chi_square(lambda number: samplers[number].choose(logits, 17, [1]))
    else:
        statistic = chi_square(lambda number: samplers[0].choose(logits, number, [1]))
    assert statistic < 50


@pytest.mark.parametrize("fault", ["noise of half the size", "uniform noise", "one token's noise too large"])
def test_a_wrong_sampler_would_be_noticed(fault: str) -> None:
    tokens = torch.arange(len(PROBABILITIES))

    def draw(seed: int) -> int:
        noise = gumbel_noise(stream_key(seed, 17), tokens)
        match fault:
            case "noise of half the size":
                noise = noise / 2
            case "uniform noise":
                noise = torch.exp(-torch.exp(-noise)) * 3
            case _:
                noise[0] += 0.1
        return int((PROBABILITIES.log().double() + noise).argmax())

    assert chi_square(draw) > 50


def test_draws_at_successive_positions_and_of_neighbour_seeds_are_independent() -> None:
    """Pairs of draws fill the 2 x 2 table of a fair coin as independent ones do."""
    logits = torch.zeros(2)
    one, other = (Sampler(SamplingParameters(temperature=1.0, seed=seed)) for seed in (5, 6))
    mine = [one.choose(logits, position, [1]) for position in range(8000)]
    theirs = [other.choose(logits, position, [1]) for position in range(8000)]
    for pairs in (Counter(itertools.pairwise(mine)), Counter(zip(mine, theirs, strict=True))):
        assert all(abs(pairs[i, j] - 2000) < 250 for i in (0, 1) for j in (0, 1)), pairs


PARAMETERS: list[dict[str, float]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.5, "top_p": 0.6, "min_p": 0.2},
]


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: "+".join(parameters))
def test_parameters_mean_what_they_mean_in_transformers(parameters: dict[str, float], model: Any) -> None:
    """The same tokens stay possible, with the same scores, as in the library's own list of processors."""
    values: dict[str, Any] = {"temperature": 1.0, **parameters}
    sampler = Sampler(SamplingParameters(**values))
    settings = GenerationConfig(
        do_sample=True, top_k=values.get("top_k", 0), **{k: v for k, v in values.items() if k != "top_k"}
    )
    library = model._get_logits_processor(settings, input_ids_seq_length=6, encoder_input_ids=None)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = torch.randn(64, generator=generator) * 3
        prefix = torch.randint(0, 64, (1, 6), generator=generator)
        expected = library(prefix, logits[None].clone())
        scores = logits[None]
        for processor in sampler._processors:
            scores = processor(prefix, scores)
        assert torch.equal(scores, expected)
        assert bool(expected[0, sampler.choose(logits, 9, prefix[0].tolist())] > -torch.inf)


def test_greedy_with_a_penalty_takes_the_largest_penalised_logit() -> None:
    sampler = Sampler(SamplingParameters(repetition_penalty=2.0))
    assert sampler.choose(torch.tensor([3.0, 2.0, 1.0]), 4, [0]) == 1


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_two_that_share_the_noise_agree_as_often_as_theory_says(number: int) -> None:
    """Between (1 - TV) / (1 + TV), the guarantee of the coupling, and 1 - TV, the most any coupling reaches."""
    generator = torch.Generator().manual_seed(number)
    target = torch.randn(30, generator=generator) * 2
    drafter = target + torch.randn(30, generator=generator) * 0.5
    distance = float((target.softmax(0) - drafter.softmax(0)).abs().sum() / 2)
    tokens = torch.arange(30)
    draws = 2000
    agreed = 0
    for position in range(draws):
        noise = gumbel_noise(stream_key(number, position), tokens)
        agreed += int((target + noise).argmax()) == int((drafter + noise).argmax())
    slack = 6 * 0.5 / draws**0.5  # six standard errors: a false alarm in fewer than one of 20 million runs
    assert (1 - distance) / (1 + distance) - slack <= agreed / draws <= 1 - distance + slack
