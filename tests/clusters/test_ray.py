"""Workers on a Ray cluster of several nodes on this machine, with GPUs that exist for Ray alone. Most workers are timed."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import dsi_actors
from dsi_actors.host.requirements import require
from support.group import config_of_a_group, make_uneven_model
from support.patience import limit_s, patience, until
from support.timed import PROMPT, gone, plain_decoding, text_of, timed_config

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings
ray = pytest.importorskip("ray")

#: Long enough that a node dies in the middle of the text, however slow it is to die.
TOKENS = 400


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without GPUs, where the orchestrator is, and a node with all that one orchestrator needs."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "_system_config": quick},
    )
    try:
        yield made
    finally:
        made.shutdown()


def node(cluster: Any, *, gpus: int) -> Any:
    return cluster.add_node(num_cpus=4, num_gpus=gpus)


def config(cluster: Any, **settings: Any) -> dsi_actors.Config:
    given = {"cluster": "ray", "ray_address": cluster.address, "devices": (), "silence_ms": 2000, **settings}
    return timed_config(target_ms=12, drafter_ms=3, **given)


def taken(resource: str) -> float:
    total, free = ray.cluster_resources(), ray.available_resources()
    return float(total.get(resource, 0.0) - free.get(resource, 0.0))


async def test_a_node_dies_in_the_middle_of_a_text(cluster: Any) -> None:
    first, *left = node(cluster, gpus=2), node(cluster, gpus=1)
    processes: set[int] = set()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        async with dsi_actors.Orchestrator(config(cluster)) as orchestrator:
            assert orchestrator.process_ids == []
            before = {worker.hello.incarnation for worker in orchestrator.workers}
            processes |= {worker.hello.process for worker in orchestrator.workers}
            devices = sorted(worker.hello.device for worker in orchestrator.workers)
            assert devices == ["cuda:0", "cuda:0", "cuda:1"], "the GPUs' own numbers on two nodes"
            names = {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}
            kinds = sorted(re.sub(r"-\d+-[0-9a-f]{16}$", "", name) for name in names)
            assert kinds == ["dsi-drafter", "dsi-target", "dsi-target"]
            assert re.fullmatch(r"tcp://[\d.]+:\d+", orchestrator.endpoint)
            left.append(node(cluster, gpus=2))  # where the lost workers can go
            text: list[int] = []
            async with patience(120):
                async for tokens in orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=TOKENS)):
                    text.extend(tokens)
                    if len(text) > 10 and len(text) - len(tokens) <= 10:
                        await asyncio.to_thread(cluster.remove_node, first, False)
            assert text == plain_decoding(PROMPT, TOKENS)
            assert await orchestrator.wait_for_workers(targets=2, drafters=1, timeout_s=limit_s(120))
            after = {worker.hello.incarnation for worker in orchestrator.workers}
            assert len(after - before) == 2, "the node's two workers were placed again, and the third one stayed"
            processes |= {worker.hello.process for worker in orchestrator.workers}
            assert await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=20))) == text[:20]
        await until(lambda: gone(processes), 60)
        await until(lambda: taken("GPU") == 0, 60)
        groups = ray.util.placement_group_table().values()
        assert {each["state"] for each in groups} == {"REMOVED"}
        assert ray.util.list_named_actors(all_namespaces=True) == []
        assert ray.is_initialized(), "the connection is the program's, not the orchestrator's"
    finally:
        ray.shutdown()
        for each in left:
            await asyncio.to_thread(cluster.remove_node, each, False)


def waiting_groups() -> int:
    return sum(each["state"] == "PENDING" for each in ray.util.placement_group_table().values())


async def test_servers_come_when_a_node_comes_and_go_when_nobody_needs_them(cluster: Any) -> None:
    nodes = [node(cluster, gpus=2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        free = taken("GPU")
        made = config(cluster, sp=None, target_servers=(1, 3), shrink_after_s=1.0)
        async with dsi_actors.Orchestrator(made) as orchestrator:

            def targets() -> int:
                return sum(worker.role == "target" for worker in orchestrator.workers)

            assert (targets(), taken("GPU") - free) == (1, 2)
            sampling, grown = dsi_actors.Sampling(max_tokens=TOKENS), asyncio.Event()

            async def ask(prompt: list[int]) -> None:
                while not grown.is_set():
                    assert await text_of(orchestrator.generate(prompt, sampling)) == plain_decoding(prompt, TOKENS)

            clients = [asyncio.create_task(ask([*PROMPT, number])) for number in range(3)]
            await until(lambda: waiting_groups() == 2, 60)  # what an autoscaler answers
            nodes.append(node(cluster, gpus=2))
            await until(lambda: targets() == 3, 120)
            grown.set()
            await asyncio.gather(*clients)
            await until(lambda: targets() == 1 and taken("GPU") - free == 2 and not waiting_groups(), 120)
            assert await text_of(orchestrator.generate(PROMPT, sampling)) == plain_decoding(PROMPT, TOKENS)
        await until(lambda: taken("GPU") == free, 60)
    finally:
        ray.shutdown()
        for each in nodes:
            await asyncio.to_thread(cluster.remove_node, each, False)


@pytest.mark.model
async def test_a_real_model(cluster: Any) -> None:
    """SmolLM2 on a node of the cluster says what it says on this machine."""
    added = node(cluster, gpus=0)
    settings: dict[str, Any] = {
        "devices": ("cpu",), "sp": 1, "drafter": None, "calibrate": False, "ready_timeout_s": 600, "silence_ms": 600_000,
        "request_timeout_s": 600,
    }  # fmt: skip
    texts: list[list[int]] = []
    for where in ({"cluster": "ray", "ray_address": cluster.address}, {}):
        async with dsi_actors.Orchestrator(dsi_actors.Config(**where, **settings)) as orchestrator:
            texts.append(await text_of(orchestrator.generate(PROMPT, dsi_actors.Sampling(max_tokens=12))))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12
    await asyncio.to_thread(cluster.remove_node, added, False)


async def test_a_group_is_placed_as_a_whole_and_again_when_it_loses_a_rank(cluster: Any, tmp_path: Path) -> None:
    """Two processes on one node, which divide a model with 3 KV heads. The text is that of a group on this machine."""
    added = node(cluster, gpus=0)
    model, sampling = make_uneven_model(tmp_path), dsi_actors.Sampling(max_tokens=100)
    async with dsi_actors.Orchestrator(config_of_a_group(model)) as orchestrator:
        expected = await text_of(orchestrator.generate(PROMPT, sampling))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        placed = config_of_a_group(model, cluster="ray", ray_address=cluster.address)
        async with dsi_actors.Orchestrator(placed) as orchestrator:
            [handle] = orchestrator.workers
            assert handle.hello.device == "cpu:0,cpu:0"
            await until(lambda: taken("CPU") == 2)  # a core for each rank; Ray counts a moment later
            [rank] = psutil.Process(handle.hello.process).children(recursive=True)
            stream = orchestrator.generate(PROMPT, sampling)
            rank.kill()
            assert await text_of(stream) == expected
            [again] = orchestrator.workers
            assert again.hello.process != handle.hello.process
        await until(lambda: gone({handle.hello.process, rank.pid, again.hello.process}), 60)
        await until(lambda: taken("CPU") == 0, 60)
    finally:
        ray.shutdown()
        await asyncio.to_thread(cluster.remove_node, added, False)


async def test_a_worker_without_a_key_of_this_run_is_turned_away(cluster: Any) -> None:
    from support.timed import start_worker

    node(cluster, gpus=0)
    async with dsi_actors.Orchestrator(config(cluster, devices=("cpu",), sp=1, drafter=None)) as orchestrator:
        stranger = start_worker(orchestrator.endpoint, "--role", "target")
        _, said = await asyncio.to_thread(stranger.communicate, timeout=limit_s(60))
        assert stranger.returncode == 1
        assert "refused the connection" in said
        assert len(orchestrator.workers) == 1
    assert not ray.is_initialized(), "the connection was the orchestrator's"


async def test_a_worker_for_which_there_is_no_place_is_said(cluster: Any) -> None:
    """And what it waits for is given back, so that nothing is demanded of an autoscaler any more."""
    with pytest.raises(dsi_actors.WorkerStartError, match=r"only \d of 5 workers were ready after 3 s"):
        async with dsi_actors.Orchestrator(config(cluster, sp=4, ready_timeout_s=3)):
            pass
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        states = {each["state"] for each in ray.util.placement_group_table().values()}
        assert states <= {"REMOVED"}
    finally:
        ray.shutdown()


async def test_a_cluster_that_is_not_there_is_said() -> None:
    with pytest.raises(
        dsi_actors.ConfigError, match=r"no Ray cluster answers at 127.0.0.1:1: start one with `ray start"
    ):
        async with dsi_actors.Orchestrator(timed_config(cluster="ray", ray_address="127.0.0.1:1", devices=())):
            pass


def test_the_extra_is_known() -> None:
    require("a Ray cluster", "ray")
