"""What is wrong with the settings of a cluster is said before anything is connected. None of this needs Ray."""

from __future__ import annotations

from typing import Any

import pytest

from dsi_actors.config import Config
from dsi_actors.errors import ConfigError
from dsi_actors.launching.ray_host import chosen_gpus

RAY: dict[str, Any] = {"cluster": "ray", "sp": 2}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"cluster": "slurm"}, "cluster must be local or ray, not 'slurm'"),
        ({"ray_address": "head:6379"}, "give cluster ray, too"),
        ({"cluster": "ray"}, r"say how many target servers to place: give sp \(--sp N\)"),
        ({**RAY, "listen": "tcp://127.0.0.1:5555"}, "leave out cluster or listen"),
        ({**RAY, "devices": ("0", "1")}, "Ray chooses the GPUs: leave out devices, or give cpu"),
        ({**RAY, "ray_address": "ray://head:10001"}, "give HOST:PORT of its head, or nothing"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Config(**settings)


def test_what_ray_is_asked_for() -> None:
    """A GPU for each model, none for prompt lookup; and models are fetched where the workers are."""
    config = Config(**RAY, drafter=("ngram", "self-int8"))
    assert config.local_workers == (
        ("gpu", "target", ""), ("gpu", "target", ""), ("gpu", "drafter", "self-int8"), ("cpu", "drafter", "ngram"),
    )  # fmt: skip
    assert config.local_models == ()
    assert config.local_models_on("cuda:0") == 0
    on_cpus = Config(**RAY, devices=("cpu",))
    assert {device for device, _, _ in on_cpus.local_workers} == {"cpu"}
    groups = Config(**RAY, tp=2, drafter="self-int8")
    assert [device for device, _, _ in groups.local_workers] == ["gpu,gpu", "gpu,gpu", "gpu"]


@pytest.mark.parametrize(
    ("given", "device", "mask"),
    [
        (["3"], "3", None),
        (["3", "1"], "3,1", None),
        (["GPU-5a", "GPU-7f"], "0,1", "GPU-5a,GPU-7f"),
        (["MIG-1"], "0", "MIG-1"),
    ],
)
def test_the_gpus_that_ray_gave_are_those_that_the_worker_names(
    given: list[str], device: str, mask: str | None
) -> None:
    """A number is the node's own, and needs no mask."""
    named, variables = chosen_gpus(given, {"CUDA_VISIBLE_DEVICES": "7", "HOME": "/"})
    assert named == device
    assert variables == {"HOME": "/", **({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})}
