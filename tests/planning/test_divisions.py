"""Divisions of GPUs among TP, SP and DP: what each gives, beside the simulator and beside timed workers that share servers."""

from __future__ import annotations

import asyncio
import time

import pytest

import dsi_actors
from dsi_actors.config import Algorithm
from dsi_actors.planning.divisions import Division, Models, best_of, divisions
from dsi_actors.simulation.run import Scenario, simulate_once
from planning.test_expectation import Fixed
from support.timed import text_of

#: The 70B target of docs/planning.md, and a drafter of 1.3 ms.
TARGET_MS = {1: 18.3, 2: 10.4, 4: 6.1}
LARGE = Models(TARGET_MS, 1.3, 0.8)


def named(found: list[Division], **what: object) -> Division:
    [division] = [each for each in found if all(getattr(each, name) == value for name, value in what.items())]
    return division


def test_each_division_is_what_the_simulator_says() -> None:
    found = list(divisions(LARGE, 5))
    assert {(each.tp, each.sp) for each in found if each.drafter == "own"} == {
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1),
    }  # fmt: skip
    for each in found:
        scenario = Scenario(target_ms=TARGET_MS[each.tp], drafter_ms=1.3, acceptance=0.8)
        run = simulate_once(scenario, Fixed(each.policy), tokens=1_500, seed=1)
        assert run.ms_per_token == pytest.approx(each.ms_per_token, rel=0.05), each
        assert each.tokens_per_s == pytest.approx(1e3 / each.ms_per_token)
        assert each.gpu_ms == pytest.approx(each.gpus * each.ms_per_token)
        assert each.target_busy_ms + each.drafter_busy_ms <= each.gpu_ms * 1.001, "no GPU is busier than it is held"


def test_tp_wins_where_two_gpus_are_fast_enough() -> None:
    """Three GPUs: TP=2, or SP=2, beside the drafter."""
    for share, winner in ((0.8, 2), (0.95, 1)):
        found = list(divisions(Models({1: 18.3, 2: 18.3 * share}, 1.3, 0.8), 3))
        assert best_of(found).tp == winner, share


def test_clients_take_servers_from_one_another() -> None:
    """SP becomes DP as clients come; then they share servers."""
    models = Models({1: 20.0}, 2.0, 0.8, position_ms=0.5)
    mixes = {
        clients: (each.sp, each.dp, each.sharers)
        for clients in (1, 2, 3, 4, 6, 16)
        for each in [named(list(divisions(models, 5, clients)), algorithm="dsi", servers=4)]
    }
    assert mixes == {1: (4, 1, 1), 2: (2, 2, 1), 3: (2, 3, 1), 4: (1, 4, 1), 6: (1, 4, 2), 16: (1, 4, 4)}
    plain = named(list(divisions(models, 5, 6)), algorithm="ar", servers=4)
    # Two servers have one generation each, the others two.
    assert plain.tokens_per_s == pytest.approx(2e3 / 20 + 4e3 / 20.5)
    assert plain.ms_per_token == pytest.approx(6e3 / plain.tokens_per_s)


def test_more_generations_give_more_tokens_and_each_takes_longer() -> None:
    models = Models(TARGET_MS, 1.3, 0.8, position_ms=0.2, window_share=1.1, window=8)
    for tp in TARGET_MS:
        for algorithm in ("ar", "dsi"):
            found = [
                named(list(divisions(models, 5, clients)), algorithm=algorithm, servers=1, tp=tp)
                for clients in (1, 2, 4, 8)
            ]
            rates, times = [each.tokens_per_s for each in found], [each.ms_per_token for each in found]
            assert rates == sorted(rates)
            assert times == sorted(times)


@pytest.mark.parametrize(("servers", "clients"), [(2, 4), (3, 2)])
async def test_timed_workers_give_what_was_planned(servers: int, clients: int) -> None:
    """Real processes lose time to messages, and more on a busy machine: so no plan may be slower than they are."""
    target_ms, drafter_ms, position_ms = 60.0, 8.0, 2.0
    common = {"seed": 7, "slots": 8, "calibrate": True}
    config = dsi_actors.Config(
        engine="timed", sp=servers, devices=("cpu",), ready_timeout_s=600, request_timeout_s=600, silence_ms=600_000,
        target_options={**common, "latency_ms": target_ms, "position_ms": position_ms},
        drafter_options={
            **common, "latency_ms": drafter_ms, "acceptance": 0.8, "position_ms": position_ms * drafter_ms / target_ms,
        },
    )  # fmt: skip
    share = (target_ms + 31 * position_ms) / target_ms
    models = Models({1: target_ms}, drafter_ms, 0.8, window_share=share, window=32, position_ms=position_ms)
    found = list(divisions(models, servers + 1, clients))
    async with dsi_actors.Orchestrator(config) as orchestrator:
        ways: tuple[tuple[Algorithm, int], ...] = (("ar", 16), ("dsi", 48))
        for algorithm, tokens in ways:
            plan = named(found, algorithm=algorithm, servers=min(servers, clients) if algorithm == "ar" else servers)
            sampling = dsi_actors.Sampling(max_tokens=tokens)

            async def rate(
                number: int, algorithm: Algorithm = algorithm, sampling: dsi_actors.Sampling = sampling
            ) -> float:  # fmt: skip
                begun_s = time.perf_counter()
                text = await text_of(orchestrator.generate([number + 1, 2, 3], sampling, algorithm=algorithm))
                return len(text) / (time.perf_counter() - begun_s)

            measured = sum(await asyncio.gather(*map(rate, range(clients))))
            assert measured < plan.tokens_per_s * (1.02 if algorithm == "ar" else 1.3), "the draws are few"
