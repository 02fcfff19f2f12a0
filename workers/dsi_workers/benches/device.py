"""Compares the time of a forward pass with the limit of the device, for `dsi-actors bench gpu`. Models have random weights.

`python -m dsi_workers.benches.device --shape 8b --device cuda:0` reads one JSON request per line and writes one JSON answer
per line:

    {"forward": width, "repeats": n}  -> {"ms": [each pass], "floor_ms": lower limit, "read_bytes": bytes that must be read}
    {"forward": width, "seconds": s}  -> the same, repeated for s seconds: shows how processes disturb one another
    {"cancel": width, "repeats": n}   -> {"ms": [from a cancel during a forward pass until the device is free]}
    {"agree": width}                  -> {"widths": [widths with the bits of this one, alone or as several windows]}
    {"generations": n, "repeats": r}  -> {"ms": [each step of plain decoding, in which n generations get a token each]}
    {"draft": count, "repeats": r}    -> {"ms": [a drafted token, of each step that may draft `count` at once]}
    {"prompt": positions, "repeats": n}
                                      -> {"ms": [until the logits after it are there], "tflop": its arithmetic}
    {"cancel_prompt": positions, "repeats": n}
                                      -> {"ms": [from a cancel during its last chunk until the device is free]}

The first line, before any request, names the device, its memory bandwidth, the positions of a chunk of a prompt, and the device's
peak rate in half precision, or null where that is not known.

The lower limit is the time to read each weight, and the keys and values of the context, once. Of a mixture of experts it counts
the experts that the rows of the last pass chose, in the mean of all layers (`experts_per_layer`; `experts_counted`: true). Where
torch's operations compute, it counts as many as the rows would choose if all choices were equally likely. The device's memory
bandwidth is measured by copying.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from dsi_workers.backend import Run
from dsi_workers.benches.requests import read_requests
from dsi_workers.benches.shapes import SHAPES, Shape, random_mixtures, random_weights
from dsi_workers.checkpoints.load import with_gpu_kernels
from dsi_workers.decoding.capacity import prompt_chunk_of, slot_positions
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.packing import pack
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.widths import Trial
from dsi_workers.engine import EngineError, Interrupted, Never, Task
from dsi_workers.engines.model import ModelEngine
from dsi_workers.session import Session

_WARM_UP, _COPIES = 5, 5
#: The most windows in one forward pass of the request `agree`.
_SLOTS = 8
#: The most rows of a run: what a verification on a GPU has. More rows are several runs, one after another.
_RUN_ROWS = 32
#: Positions behind the context, for the rows of a forward and for generated tokens.
_POSITIONS_BEHIND = 512
#: A prompt is not read again after so many seconds in all, but at least twice.
_LONG_S = 5.0
#: The most dense arithmetic in bfloat16 or float16, in TFLOP/s, by a part of the device's name (NVIDIA's data sheets). Cards for
#: PCIe and in pairs (NVL) of the first two have less.
_PEAK_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0, "A100": 312.0}
_SLOWER_CARDS = ("H100 NVL", "H200 NVL", "PCIe")


class DeviceBench:
    """Answers the requests for one model on one device."""

    def __init__(
        self, shape: Shape, device: torch.device, *, dtype: torch.dtype, context: int, graphs: bool, prompt_chunk: int,
        longest_prompt: int, generations: int = 1,
    ) -> None:  # fmt: skip
        """`generations`: the most of them at the same time."""
        self._device, self._context, self._window = device, context, 8
        self._shape = shape
        weights = random_weights(shape, device, dtype)
        #: Without the embedding, of which only a few rows are read. The head is a separate matrix of the same shape.
        self._weight_bytes = sum(
            weight.numel() * weight.element_size() for name, weight in weights.items() if "embed" not in name
        )
        self._kv_bytes = 2 * shape.layers * shape.kv_heads * shape.dim * dtype.itemsize
        positions = context + _POSITIONS_BEHIND
        prompt_positions = slot_positions(longest_prompt, prompt_chunk)
        longest = max(positions, prompt_positions)
        angles = torch.outer(torch.arange(longest), 5e5 ** -torch.linspace(0, 1, shape.dim // 2))
        angles = torch.cat((angles, angles), dim=-1)
        config = SimpleNamespace(
            rms_norm_eps=1e-5, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.dim, hidden_size=shape.hidden, vocab_size=shape.words,
        )  # fmt: skip
        with torch.inference_mode():
            mixtures = random_mixtures(shape, device, dtype)
            self._weight_bytes += shape.layers * shape.experts * shape.hidden * dtype.itemsize  # the routers
            self._expert_bytes = shape.expert_weights * dtype.itemsize
            decoder = Decoder(weights, config, angles.cos().to(dtype), angles.sin().to(dtype), mixtures=mixtures)
            weights.clear()
            decoder.replace_linear_layers(lambda linear: pack(linear, self._window))
        recorded = graphs and device.type == "cuda"
        decoder.prompt_chunk = prompt_chunk
        decodes = with_gpu_kernels(decoder, prompt_chunk=prompt_chunk) if recorded else decoder
        #: How many experts of each layer the last forward read, where kernels compute them.
        self._count_experts: Callable[[], list[int]] | None = getattr(decodes, "experts_read", None)
        self._forward = Forward(decodes, config, device, slots=generations, capacity=positions)
        self._engine: ModelEngine | None = None
        self._sessions: list[Session] = []
        #: With a KV cache of its own, allocated when the first prompt is read: a long one would slow short forwards down.
        self._prompts = Forward(decodes, config, device, slots=1, capacity=prompt_positions)
        self._bytes_per_ms = self._copy_rate()

    def forward(self, width: int, repeats: int = 20, seconds: float = 0.0) -> dict[str, Any]:
        """Time forward passes of `width` rows, at least `repeats` passes and at least `seconds`."""
        end = self._context + width
        begins = range(self._context, end, _RUN_ROWS)
        widths = [min(_RUN_ROWS, end - begin) for begin in begins]
        # Other tokens in each row: equal ones would choose the same experts.
        tokens = [31 * position % self._shape.words for position in range(end)]
        runs = [
            Run(0, tokens[begin : begin + rows], begin, rows, begin) for begin, rows in zip(begins, widths, strict=True)
        ]
        for _ in range(_WARM_UP):
            self._forward.timed_s(runs, rows=width, logit_rows=width)
        times_ms, begun = list[float](), time.perf_counter()
        while len(times_ms) < repeats or time.perf_counter() - begun < seconds:
            times_ms.append(self._forward.timed_s(runs, rows=width, logit_rows=width) * 1e3)
        read_bytes = self._weight_bytes + self._kv_bytes * (self._context + width)
        experts: dict[str, Any] = {}
        if self._shape.experts:
            counted = None if self._count_experts is None else self._count_experts()
            each = self._shape.expected_experts(width) if counted is None else statistics.fmean(counted)
            read_bytes += round(each * self._shape.layers * self._expert_bytes)
            experts = {"experts_per_layer": each, "experts_counted": counted is not None}
        return {"ms": times_ms, "floor_ms": read_bytes / self._bytes_per_ms, "read_bytes": read_bytes, **experts}

    def cancel(self, width: int, repeats: int = 20) -> dict[str, Any]:
        """Time from a cancel, at a random moment of a forward pass, until the device is free."""
        return self._cancel(self._forward, Run(0, [1] * width, self._context, width, self._context), repeats)

    def prompt(self, positions: int, repeats: int = 20) -> dict[str, Any]:
        """Time prompts, read chunk by chunk as a target does."""
        self._read_s(positions)  # compiles kernels
        times_s = list[float]()
        while len(times_s) < repeats and (len(times_s) < 2 or sum(times_s) < _LONG_S):
            times_s.append(self._read_s(positions))
        return {"ms": [1e3 * time_s for time_s in times_s], "tflop": self._shape.prompt_flop(positions) / 1e12}

    def cancel_prompt(self, positions: int, repeats: int = 20) -> dict[str, Any]:
        """Time from a cancel, at a random moment of the prompt's last chunk, until the device is free."""
        return self._cancel(self._prompts, self._chunks(positions)[-1], repeats)

    def _chunks(self, positions: int) -> list[Run]:
        chunk = self._prompts.prompt_chunk
        tokens = [31 * position % self._shape.words for position in range(positions)]
        return [
            Run(0, tokens[begin : begin + chunk], begin, min(chunk, positions - begin), positions - 1)
            for begin in range(0, positions, chunk)
        ]

    def _read_s(self, positions: int) -> float:
        begun = time.perf_counter()
        for run in self._chunks(positions):
            self._prompts([run], rows=run.width, logit_rows=len(run.wanted))
        self._prompts.finish()
        return time.perf_counter() - begun

    def _cancel(self, forward: Forward, one: Run, repeats: int) -> dict[str, Any]:
        run, width, logit_rows = [one], one.width, len(one.wanted)
        whole_s = min(forward.timed_s(run, rows=width, logit_rows=logit_rows) for _ in range(_WARM_UP))
        chance, times_ms = random.Random(5), list[float]()
        for _ in range(100 * repeats):
            interrupt = _At(time.perf_counter() + chance.random() * whole_s)
            forward.interrupt = interrupt
            try:
                forward(run, rows=width, logit_rows=logit_rows)
            except Interrupted:
                forward.finish()
                times_ms.append((time.perf_counter() - interrupt.due_s) * 1e3)
            forward.finish()
            if len(times_ms) == repeats:
                break
        forward.interrupt = Never()
        return {"ms": times_ms, "forward_ms": whole_s * 1e3}

    def agree(self, width: int) -> dict[str, Any]:
        """Find the widths whose bits agree with a window of `width` rows (widths.py)."""
        trial = Trial(self._forward, window=width, words=self._shape.words, name=f"a random model on {self._device}")
        try:
            return {"widths": sorted(trial.widths(_SLOTS).costs_s)}
        except EngineError as error:
            return {"widths": [], "problem": str(error)}

    def generations(self, number: int, repeats: int = 20) -> dict[str, Any]:
        """Time steps of plain decoding for so many generations: the forward pass, the choice of tokens, and all between."""
        while len(self._sessions) < number:
            session = Session(len(self._sessions), self._context, "bench")
            session.write(0, [place * 31 % self._shape.words for place in range(self._context)])
            self._step([session])  # reads the prompt
            self._sessions.append(session)
        sessions, times_ms = self._sessions[:number], list[float]()
        for session in sessions:  # the same texts as in each other measurement: positions behind the context are few
            session.truncate(self._context + 1)
        for step in range(_WARM_UP + min(repeats, _POSITIONS_BEHIND // 2)):
            begun = time.perf_counter()
            self._step(sessions)
            if step >= _WARM_UP:
                times_ms.append((time.perf_counter() - begun) * 1e3)
        return {"ms": times_ms}

    def draft(self, count: int, repeats: int) -> dict[str, Any]:
        """Time a drafted token, where `count` of them are drafted at once."""
        self.generations(1, 1)
        [session, *_] = self._sessions
        session.truncate(self._context + 1)
        times_ms = list[float]()
        for step in range(_WARM_UP + min(repeats, _POSITIONS_BEHIND // count - _WARM_UP - 1)):
            begun, length = time.perf_counter(), len(session.tokens)
            self._step([session], count)
            if step >= _WARM_UP:
                times_ms.append((time.perf_counter() - begun) * 1e3 / (len(session.tokens) - length))
        return {"ms": times_ms}

    def _step(self, sessions: Sequence[Session], count: int = 1) -> None:
        """Give each generation `count` more tokens, where the decoder drafts several at once; otherwise one."""
        if self._engine is None:
            backend = TorchBackend(
                self._forward, None, vocabulary="", vocabulary_size=self._shape.words, window=self._window,
                max_length=self._context + _POSITIONS_BEHIND,
            )  # fmt: skip
            # As a drafter: each of its forwards has as many rows as there are generations.
            self._engine = ModelEngine(backend, exact=False, calibrate=False)
        tasks = [Task(session, len(session.tokens), count, block=count) for session in sessions]
        while left := [task for task in tasks if not task.done]:
            self._engine.step(left, Never())
        for task in tasks:
            task.session.write(task.start, task.answer.tokens)

    def _copy_rate(self) -> float:
        """Bytes per ms, read and written, of the fastest copy on the device."""
        size = min(1 << 30, max(1 << 24, self._weight_bytes // 8))
        source = torch.zeros(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        times_s = []
        for _ in range(_COPIES):
            begun = time.perf_counter()
            target.copy_(source)
            self._forward.finish()
            times_s.append(time.perf_counter() - begun)
        return 2 * size / (min(times_s) * 1e3)


class _At(Never):
    """An interrupt from a point in time on."""

    def __init__(self, due_s: float) -> None:
        self.due_s = due_s

    def check(self) -> None:
        if time.perf_counter() >= self.due_s:
            raise Interrupted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsi_workers.benches.device", description=__doc__)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--generations", type=int, default=1, help="the most at the same time")
    parser.add_argument("--no-graphs", action="store_false", dest="graphs")
    parser.add_argument("--chunk", type=int, default=0, help="positions of a chunk of a prompt (0: the device's)")
    parser.add_argument("--longest-prompt", type=int, default=512)
    arguments = parser.parse_args()
    requests = read_requests()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    bench = DeviceBench(
        SHAPES[arguments.shape], device, dtype=dtype, context=arguments.context, graphs=arguments.graphs,
        prompt_chunk=arguments.chunk or prompt_chunk_of(device.type), longest_prompt=arguments.longest_prompt,
        generations=arguments.generations,
    )  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    _say(
        {
            "device": name, "bytes_per_ms": bench._bytes_per_ms, "prompt_chunk": bench._prompts.prompt_chunk,
            "peak_tflops": peak_tflops(name) if dtype.itemsize == 2 else None,
        }
    )  # fmt: skip
    for request in requests:
        if "forward" in request:
            _say(bench.forward(request["forward"], request.get("repeats", 1), request.get("seconds", 0.0)))
        elif "cancel" in request:
            _say(bench.cancel(request["cancel"], request["repeats"]))
        elif "generations" in request:
            _say(bench.generations(request["generations"], request["repeats"]))
        elif "draft" in request:
            _say(bench.draft(request["draft"], request["repeats"]))
        elif "prompt" in request:
            _say(bench.prompt(request["prompt"], request["repeats"]))
        elif "cancel_prompt" in request:
            _say(bench.cancel_prompt(request["cancel_prompt"], request["repeats"]))
        else:
            _say(bench.agree(request["agree"]))
    return 0


def peak_tflops(device: str) -> float | None:
    """The most dense arithmetic in half precision of the device with this name, in TFLOP/s. None: not known."""
    if any(card in device for card in _SLOWER_CARDS) and "A100" not in device:
        return None
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device), None)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
