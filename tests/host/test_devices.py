"""Where local workers run, and how many target servers there is room for."""

from __future__ import annotations

import os

import pytest

from dsi_actors.config import Config
from dsi_actors.errors import ConfigError
from dsi_actors.generation.knowledge import can_overlap
from dsi_actors.host.devices import crowding, device_name, local_devices, servers_beside_drafters
from dsi_actors.workforce.worker_handle import WorkerHandle
from dsi_protocol import Hello


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


def have_cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(number)), raising=False)


def test_names_are_torchs() -> None:
    assert [device_name(text) for text in ("0", "3", "cpu", "cpu:1")] == ["cuda:0", "cuda:3", "cpu:0", "cpu:1"]
    with pytest.raises(ConfigError, match="'gpu1' is no device"):
        device_name("gpu1")


def test_each_gpu_has_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_devices([]) == ["0", "1", "2", "3"]
    assert servers_beside_drafters([], 1, threads=1) == 3
    assert servers_beside_drafters([], 0, threads=1) == 4
    assert servers_beside_drafters(["1", "2"], 1, threads=1) == 1
    assert servers_beside_drafters(["1"], 1, threads=1) == 1
    assert servers_beside_drafters(["1", "cpu"], 1, threads=1) == 1


@pytest.mark.parametrize(
    ("number", "threads", "drafters", "servers"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 0, 2), (3, 1, 1, 2), (3, 1, 2, 2), (16, 1, 1, 2), (16, 8, 1, 1)],
)
def test_on_a_cpu_each_worker_has_cores_of_its_own(
    number: int, threads: int, drafters: int, servers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_cores(monkeypatch, number)
    assert servers_beside_drafters(["cpu"], drafters, threads=threads) == servers


def test_a_configuration_says_how_many_servers_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cores(monkeypatch, 2)
    assert Config(sp=5, devices=("cpu",)).local_servers == 5
    assert Config(devices=("cpu",)).local_servers == 1
    assert Config(devices=("cpu",), drafter="ngram").local_servers == 2
    assert Config(devices=("cpu",), drafter="ngram+self-int8").local_servers == 1
    assert Config().local_servers == 3
    assert Config(engine="timed", devices=("cpu",)).local_servers == 2


def test_a_group_takes_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are four GPUs."""
    have_cores(monkeypatch, 2)
    assert servers_beside_drafters([], 1, threads=1, each=2) == 1
    assert servers_beside_drafters([], 0, threads=1, each=2) == 2
    assert servers_beside_drafters(["cpu"], 0, threads=1, each=2) == 1
    target, drafter = ("0,1", "target", ""), ("2", "drafter", "self-int8")
    assert Config(tp=2).local_workers == (target, drafter)
    assert Config(tp=2, drafter=None).local_workers == (target, ("2,3", "target", ""))
    assert Config(tp=2, sp=1, devices=("cpu",)).local_workers[0] == ("cpu,cpu", "target", "")
    shared = Config(tp=2, devices=("0", "1"))
    assert [shared.local_models_on(device) for device in ("cuda:0", "cuda:1")] == [2, 1]
    for devices in (("0",), ("0", "0"), ("0", "cpu")):
        with pytest.raises(ConfigError, match="a target server needs as many GPUs, each named once"):
            assert Config(tp=2, devices=devices).local_workers
    with pytest.raises(ConfigError, match="only the engine transformers divides"):
        Config(tp=2, engine="timed")
    with pytest.raises(ConfigError, match="tp is for workers that are started here or by Ray"):
        Config(tp=2, listen="ipc://here")


@pytest.mark.parametrize(
    ("targets", "drafters", "threads", "problem"),
    [
        (["cpu,cpu"], ["cpu"], 1, "3 workers with 1 thread each have 2 cores: they slow one another down"),
        (["0,1"], ["2"], 1, None),
        (["0,1"], ["1"], 1, "2 workers share cuda:1: they take turns"),
        (["cpu"], ["cpu"], 1, None),
        (["cpu"], ["cpu", "cpu"], 1, None),
        (["cpu"], ["cpu"], 2, "2 workers with 2 threads each have 2 cores: they slow one another down"),
        (["cpu", "cpu"], ["cpu"], 1, "3 workers with 1 thread each have 2 cores: they slow one another down"),
        (["0"], ["1"], 8, None),
        (["0", "1"], ["1"], 1, "2 workers share cuda:1: they take turns"),
        (["0"], ["1", "0"], 1, "2 workers share cuda:0: they take turns"),
        (["0"], ["cpu"], 2, None),
    ],
)
def test_workers_without_a_device_of_their_own_are_told_of(
    targets: list[str], drafters: list[str], threads: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_cores(monkeypatch, 2)
    assert crowding(targets, drafters, threads) == problem


@pytest.mark.parametrize(
    ("targets", "drafters", "overlaps"),
    [
        (["a cuda:0"], [], True),
        (["a cuda:0"], ["a cuda:0"], False),
        (["a cuda:0", "a cuda:1"], ["a cuda:1"], False),
        (["a cuda:0"], ["a cuda:1"], True),
        (["a cuda:0"], ["b cuda:0"], True),
        (["a cuda:0"], ["a cuda:0", "a cuda:1"], True),
        (["a cpu:0"], ["a cpu:0"], True),
        (["a cuda:0,cuda:1"], ["a cuda:1"], False),
        (["a cuda:0,cuda:1"], ["a cuda:2"], True),
        (["a cuda:0"], ["a cuda:0*"], True),  # prompt lookup
    ],
)
def test_processes_on_one_gpu_take_turns(targets: list[str], drafters: list[str], overlaps: bool) -> None:
    def worker(place: str, role: str) -> WorkerHandle:
        host, device = place.split()
        hello, computes = Hello(1, 1, role, "auto", "", device.strip("*"), host, 1), "*" not in device
        return WorkerHandle(1, b"", hello, role, lambda message: None, occupies_device=computes)

    assert (
        can_overlap([worker(each, "target") for each in targets], [worker(each, "drafter") for each in drafters])
        == overlaps
    )
