"""How a model is meant to be sampled where the user says nothing, by its generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from dsi_actors.config import Sampling
from dsi_actors.errors import ConfigError
from dsi_actors.tokenization.settings import Settings

_NUCLEUS = ("top_k", "top_p", "min_p")
#: The parameters that a model may have defaults for.
DEFAULT_NAMES = ("temperature", *_NUCLEUS, "repetition_penalty")


def sampling_defaults(generation_config: Settings) -> Mapping[str, float]:
    """Fields of `Sampling` and their values, for those that the file gives. Raises ConfigError for values that make no sense.

    Temperature, top_k, top_p and min_p count only where do_sample is true, as in transformers. The temperature is 1 then unless
    the file gives another one.
    """
    found: dict[str, float] = {}
    if generation_config.values.get("do_sample") is True:
        found["temperature"] = 1.0
        names: tuple[str, ...] = DEFAULT_NAMES
    else:
        names = ("repetition_penalty",)
    for name in names:
        value = generation_config.values.get(name)
        if value is None or (name == "top_k" and value == 0):  # 0: all tokens are kept
            continue
        if type(value) not in (int, float):
            raise generation_config.wrong(name, "a number")
        found[name] = value
    found = {name: value for name, value in found.items() if name == "temperature" or value != _NEUTRAL[name]}
    try:
        Sampling(**found)  # type: ignore[arg-type]  # top_k is checked there
    except ConfigError as error:
        raise ConfigError(f"{generation_config.file}: {error}") from None
    return found


#: Values that change nothing.
_NEUTRAL = {"top_k": None, "top_p": 1, "min_p": 0, "repetition_penalty": 1}


def described_defaults(defaults: Mapping[str, float]) -> str:
    """The defaults in one line."""
    values = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return f"{values}, by the model's generation_config.json"
