"""The options of our own engines, by name: what `--set` may change. The engines themselves check values (workers/dsi_workers)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dsi_actors.errors import ConfigError
from dsi_protocol import OptionValue

#: Of engines/loading.py.
_MODEL = (
    "dtype quantization window max_length slots memory_share threads prompt_threads kernels calibrate lookup remember target "
    "layers adapter"
)
#: Of engines/llama_cpp.py.
_LLAMA_CPP = "quantization flash_attention dtype window max_length slots threads calibrate lookup remember target"
_TIMED = "latency_ms position_ms jitter acceptance alternatives seed vocabulary_size any_vocabulary slots chunk calibrate device"
#: Known names for each engine. An engine of another package knows its own.
KNOWN: Mapping[str, frozenset[str]] = {
    "transformers": frozenset(_MODEL.split()),
    "llama-cpp": frozenset(_LLAMA_CPP.split()),
    "timed": frozenset(_TIMED.split()),
    "ngram": frozenset({"block", "remember"}),
}
_ROLES = ("target", "drafter")


def read_settings(settings: Iterable[str], engine: str) -> dict[str, dict[str, OptionValue]]:
    """From `target.KEY=VALUE` and `drafter.KEY=VALUE` to the options of each role. Raises ConfigError."""
    found: dict[str, dict[str, OptionValue]] = {role: {} for role in _ROLES}
    for setting in settings:
        name, equals, text = setting.partition("=")
        role, dot, key = name.partition(".")
        if not (equals and dot and key and role in _ROLES):
            raise ConfigError(f"--set {setting}: write target.KEY=VALUE or drafter.KEY=VALUE")
        known = KNOWN.get(engine)
        if known is not None and key not in known | (KNOWN["ngram"] if role == "drafter" else frozenset()):
            raise ConfigError(
                f"--set {setting}: the engine {engine} has no option {key}; it has {', '.join(sorted(known))}"
            )
        found[role][key] = _value(text)
    return found


def _value(text: str) -> OptionValue:
    """true and false, whole numbers, numbers, else text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
