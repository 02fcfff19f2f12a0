"""Any causal language model that transformers can load and whose state can be rewound, on a CPU or a CUDA device.

A target computes the prompt in chunks aligned to position 0, and every later position at a width that gives the bits of
a full window, so that a token's logits do not depend on how the tokens around it were grouped into requests
(docs/exactness.md). A drafter only guesses: it computes exactly the tokens that it must.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dsi_protocol import OptionValue
from dsi_workers.attention import ATTENTION, attention
from dsi_workers.compatibility import position_limit, refuse_if_not_rewindable
from dsi_workers.engines.base import Answer, Engine, EngineError, EngineInfo, Interrupt
from dsi_workers.kv_cache import SlotCache
from dsi_workers.models import ModelError, read_vocabulary_hash, resolve_model
from dsi_workers.packing import pack_linear_layers
from dsi_workers.quantization import quantize_int8
from dsi_workers.sampling import Sampler
from dsi_workers.session import Session

PROMPT_CHUNK = 128
#: The readable part of the cache grows in steps of so many positions, if that keeps the bits: shorter reads, few shapes.
READ_STEP = 512
_NARROW_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Never:
    """The interrupt of warm-up: nothing interrupts it."""

    def check(self) -> None:
        pass

    def wait_until(self, deadline_s: float) -> None:
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


class TransformersEngine(Engine):
    """Options: dtype (auto, float32, bfloat16, float16), quantization ("" or int8), window, max_length, slots, threads."""

    def __init__(self, model: str, *, device: str, drafter: bool, options: Mapping[str, OptionValue]) -> None:
        torch.set_num_threads(_whole(options, "threads", 1))
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._device = _check_device(device)
        try:
            directory = resolve_model(model)
        except ModelError as error:
            raise EngineError(str(error)) from None
        try:  # code that came with a model is never run
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            raise EngineError(f"transformers cannot read the configuration of {model}: {error}") from None
        refuse_if_not_rewindable(config, model)
        self._config = config.get_text_config(decoder=True)
        max_length = min(_whole(options, "max_length", 2048), position_limit(self._config))
        self._last_position = max_length - 1
        self._exact = not drafter
        self._window = _whole(options, "window", 8)
        #: For each number of positions, the width of the forward that computes them: see _choose_widths.
        self._widths = [self._window] * (self._window + 1)
        quantization = str(options.get("quantization", ""))
        dtype = self._choose_dtype(str(options.get("dtype", "auto")), quantization)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )
        if quantization:
            if quantization != "int8":
                raise EngineError(f"unknown quantization {quantization!r}: only int8 is known")
            quantize_int8(self._model)
        self._model.eval().requires_grad_(False).to(self._device)
        pack_linear_layers(self._model, self._window)
        _keep_freed_memory()
        self._interrupt: Interrupt = _Never()
        for layer in self._decoder_layers():
            layer.register_forward_pre_hook(self._between_layers)
        self._slots: OrderedDict[int, int] = OrderedDict()  # generation -> slot, least recently used first
        self._sessions: dict[int, Session] = {}
        self._samplers: dict[int, Sampler] = {}
        #: The cache is read up to the next multiple of this.
        self.read_step = READ_STEP
        self._cache = SlotCache(
            int(self._config.num_hidden_layers),
            slots=_whole(options, "slots", 4),
            capacity=_round_up(max_length + max(PROMPT_CHUNK, self._window), READ_STEP),
        )
        latency_us, window_latency_us = self._warm_up(calibrate=options.get("calibrate", True) is not False)
        self.info = EngineInfo(
            vocabulary=read_vocabulary_hash(directory),
            vocabulary_size=int(self._config.vocab_size),
            max_length=max_length,
            window=self._window,
            latency_us=latency_us,
            window_latency_us=window_latency_us,
        )

    # Verify and draft

    @torch.inference_mode()
    def verify(self, session: Session, start: int, interrupt: Interrupt) -> Answer:
        self._interrupt = interrupt
        self._cache.slot = self._slot_of(session)
        answer = Answer([])
        length = len(session.tokens)
        # The token at position p comes out of the input at p - 1, so inputs [start - 1, length) are needed, and
        # before them whatever this worker has not read yet.
        position = min(session.computed, start - 1)
        while position < length:
            begin, end, width = self._next_chunk(session, position)
            # Padding and an interrupt leave what they like from `begin` on: until the forward is done it is not computed.
            session.computed = min(session.computed, begin)
            logits = self._forward(session.tokens[begin:end], begin, width, first_logits=max(start - 1, begin))
            session.computed = end
            if self._choose(session, start, logits, answer):
                break
            position = end
        return answer

    def _choose(self, session: Session, start: int, logits: torch.Tensor, answer: Answer) -> bool:
        """Add the tokens that `logits` [n, vocabulary] give to the answer; whether one differs from the session's."""
        sampler = self._samplers.get(session.generation)
        choices = logits.argmax(dim=-1).tolist() if sampler is None else None
        for row in range(len(logits)):
            at = start + len(answer.tokens)
            if sampler is not None:
                token = sampler.choose(logits[row], at, session.tokens[:at])
            else:
                assert choices is not None
                token = choices[row]
            answer.tokens.append(token)
            if session.sampling.logprobs:
                answer.logprobs.append(float(logits[row].float().log_softmax(dim=-1)[token]))
            if at < len(session.tokens) and session.tokens[at] != token:
                return True
        return False

    def _next_chunk(self, session: Session, position: int) -> tuple[int, int, int]:
        """The inputs [begin, end) of the forward that computes `position`, and the width it is padded to."""
        length = len(session.tokens)
        if not self._exact:
            end = min(position + PROMPT_CHUNK, length)
            return position, end, end - position
        if position < session.prompt_length:
            begin = position - position % PROMPT_CHUNK
            width = min(PROMPT_CHUNK, session.prompt_length - begin)  # a function of the prompt alone, all here or not
            return begin, min(begin + width, length), width
        end = min(position + self._window, length)
        return position, end, self._padded(end - position)

    def _forward(self, tokens: list[int], begin: int, width: int, first_logits: int) -> torch.Tensor:
        """One forward over the inputs [begin, begin + len(tokens)): the logits [n, vocabulary] after each one from
        `first_logits` on. Interrupted between layers."""
        self._interrupt.check()
        self.forwards += 1
        end = begin + len(tokens)
        cache = self._cache
        cache.position = begin
        cache.readable = min(_round_up(begin + width, self.read_step), cache.capacity)
        positions = torch.arange(begin, begin + width, device=self._device)
        ids = torch.zeros(1, width, dtype=torch.long)
        ids[0, : len(tokens)] = torch.tensor(tokens)
        wanted = range(max(first_logits, begin), end)
        rows = self._logit_rows(wanted, begin, width)
        logits: torch.Tensor = self._model(
            input_ids=ids.to(self._device),
            # Padding may lie beyond the last position that the model knows, or where its rope would change for all.
            position_ids=positions.clamp(max=self._last_position)[None],
            attention_mask=self._masks(positions),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(rows, device=self._device),
        ).logits
        return logits[0, : len(wanted)]

    def _logit_rows(self, wanted: range, begin: int, width: int) -> list[int]:
        """The rows of the forward to compute logits for: the wanted ones, in an exact engine padded to a full window
        because the bits of a matrix product may depend on how many rows it has."""
        rows = [position - begin for position in wanted]
        if self._exact:
            rows += [0] * (self._padded(len(rows)) - len(rows))
        return rows or [0]

    def _padded(self, rows: int) -> int:
        """The width at which `rows` rows are computed. (More than a window of them lie inside a prompt.)"""
        return self._widths[rows] if rows <= self._window else rows

    def _masks(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Boolean masks [1, 1, width, readable]: input at position p reads positions [0, p], or the last `window`."""
        slots = torch.arange(self._cache.readable, device=self._device)
        full: torch.Tensor = slots[None, :] <= positions[:, None]
        window = getattr(self._config, "sliding_window", None)
        kinds = set(getattr(self._config, "layer_types", None) or ())
        if not window or (kinds and "sliding_attention" not in kinds):
            return full[None, None]
        sliding: torch.Tensor = (full & (slots[None, :] > positions[:, None] - window))[None, None]
        if not kinds:
            return sliding
        return {"full_attention": full[None, None], "sliding_attention": sliding}

    # Interrupts

    def _between_layers(self, module: nn.Module, inputs: Any) -> None:
        self._interrupt.check()

    def _decoder_layers(self) -> nn.ModuleList:
        """The longest list of modules in the model: its decoder layers."""
        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    # Slots

    def _slot_of(self, session: Session) -> int:
        """The session's slot in the cache. If all are taken, the least recently used session will compute again."""
        generation = session.generation
        slot = self._slots.pop(generation, None)
        if slot is None:
            session.computed = 0
            if len(self._slots) < self._cache.slots:
                slot = next(number for number in range(self._cache.slots) if number not in self._slots.values())
            else:
                loser, slot = self._slots.popitem(last=False)
                self._sessions.pop(loser).computed = 0
        if not session.sampling.plain_greedy and generation not in self._samplers:
            self._samplers[generation] = Sampler(session.sampling)
        self._slots[generation] = slot
        self._sessions[generation] = session
        return slot

    def forget(self, session: Session) -> None:
        self._slots.pop(session.generation, None)
        self._sessions.pop(session.generation, None)
        self._samplers.pop(session.generation, None)

    # Start

    def _choose_dtype(self, name: str, quantization: str) -> torch.dtype:
        if quantization:
            return torch.bfloat16
        if name == "auto":
            return torch.float32 if self._device.type == "cpu" else torch.bfloat16
        if name not in _DTYPES:
            raise EngineError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]

    @torch.inference_mode()
    def _choose_widths(self) -> list[int]:
        """For each number of positions up to a window the cheapest width that gives the very bits of full windows.

        A narrow forward can be much cheaper, but kernels may sum in another order for another number of rows. So it is
        tried: the same tokens, in groups of each width.
        """
        if not self._windows_agree():
            self.read_step = self._cache.capacity
            if not self._windows_agree():
                raise EngineError(
                    f"{self._config.model_type} on {self._device} gives other bits when it computes the same tokens "
                    "again: what a target server says would depend on chance, choose another model, dtype or device"
                )
        begin = self._edges()[0] - self._window // 2
        expected, cost_s = self._in_groups(begin, self._window, self._window)
        costs_s = {self._window: cost_s}
        for width in (width for width in _NARROW_WIDTHS if width < self._window):
            logits, cost_s = self._in_groups(begin, self._window, width)
            if torch.equal(logits, expected):
                costs_s[width] = cost_s
        return [
            min((width for width in costs_s if width >= rows), key=lambda width: costs_s[width])
            for rows in range(self._window + 1)
        ]

    def _windows_agree(self) -> bool:
        """Whether windows that begin elsewhere, and so read another length of the cache, give the same bits.

        On one processor reading 256 or 512 positions gave other bits for the same token, 512 or 1024 the same. Sums
        over zeros would not show it: the cache is filled with random numbers.
        """
        self._cache.fill_at_random()
        half = self._window // 2
        for edge in self._edges():
            apart, _ = self._in_groups(edge - self._window, 2 * self._window, self._window)
            across, _ = self._in_groups(edge - half, self._window, self._window)
            if not torch.equal(apart[self._window - half :][: self._window], across):
                return False
        return True

    def _edges(self) -> list[int]:
        """Where a longer part of the cache is read from: the first and the last."""
        step, capacity = self.read_step, self._cache.capacity
        last = (capacity - self._window) // step * step
        return sorted({step, last}) if last else [capacity // 2]

    def _in_groups(self, begin: int, count: int, width: int) -> tuple[torch.Tensor, float]:
        """Logits after `count` tokens from position `begin` on, read `width` at a time (keys and values, too), and the
        shortest time that a group took: what disturbs a forward makes it longer."""
        words = min(97, int(self._config.vocab_size))
        tokens = [7 * position % words for position in range(begin, begin + count)]
        self._widths = [width] * (self._window + 1)
        logits, times_s = [], []
        for first in range(0, count, width):
            begun = time.perf_counter()
            logits.append(self._forward(tokens[first : first + width], begin + first, width, begin + first))
            times_s.append(time.perf_counter() - begun)
        return torch.cat(logits), min(times_s)

    @torch.inference_mode()
    def _warm_up(self, *, calibrate: bool) -> tuple[int, int]:
        """Run what will be run. Returns the median time in µs of a verification of one position and of a window, or of
        one drafted token and 0; zeros if not to `calibrate`."""
        self._check_attention()
        if self._exact:
            self._widths = self._choose_widths()
        session = Session(generation=0, prompt_length=PROMPT_CHUNK, correlation="warm-up")
        session.write(0, [position % 16 for position in range(PROMPT_CHUNK)])
        self.verify(session, PROMPT_CHUNK, _Never())

        def draft() -> None:
            session.write(len(session.tokens), [0])
            self.draft(session, 1, _Never())

        def verify(positions: int) -> None:  # whatever they give
            self._forward([0] * positions, PROMPT_CHUNK, self._padded(positions), first_logits=PROMPT_CHUNK)

        latencies = 0, 0
        if calibrate and self._exact:
            latencies = _median_us(lambda: verify(1)), _median_us(lambda: verify(self._window))
        elif calibrate:
            latencies = _median_us(draft), 0
        self.forget(session)
        self.forwards = 0
        return latencies

    def _check_attention(self) -> None:
        calls = attention.calls
        self._forward([0], 0, 1, first_logits=0)
        if attention.calls - calls != int(self._config.num_hidden_layers):
            raise EngineError(
                f"{self._config.model_type} models do not use transformers' attention interface in every layer: "
                "their masks cannot be trusted here, choose another model"
            )


def _median_us(step: Callable[[], None]) -> int:
    times: list[float] = []
    for _ in range(3):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return max(1, round(sorted(times)[1] * 1e6))


def _whole(options: Mapping[str, OptionValue], name: str, default: int) -> int:
    value = options.get(name, default)
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise EngineError(f"option {name} must be a whole number of at least 1, not {value!r}")
    return value


def _check_device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index) >= count:
        has = f"this machine has {count}" if count else "this machine has no CUDA device; --gpu cpu runs on the CPU"
        raise EngineError(f"there is no GPU {index}: {has}")
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Give back what loading needed, once. From then on stop glibc from giving large blocks back after each forward:
    at long contexts the page faults that follow can cost as much as the forward itself."""
    if os.uname().sysname == "Linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
        except OSError:  # another C library
            return
        libc.malloc_trim(0)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 30)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
