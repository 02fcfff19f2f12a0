"""Runs llama.cpp itself, in a separate process, for benchmarks that compare with it.

`python -m dsi_workers.benches.llama_cpp --model REF --quantization KIND` reads one JSON request per line and writes one JSON
answer per line, as reference.py does for transformers:

    {"generate": [ids], "max_tokens": n, "stop": [ids], "threads": n, "assist": ""}
        -> {"tokens": [ids], "times_ms": [since the request]}

All is greedy. Without `assist` it is the loop of llama.cpp's own examples: decode one token, take the most probable one, both in
C. With "lookup" it is the prompt lookup of llama-cpp-python, and with "drafter" its speculation with the model of --drafter, or
with these weights as Q4_0. Contexts are made as by default: only the threads are set.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from dsi_workers.benches.requests import read_requests
from dsi_workers.engine import EngineError
from dsi_workers.llama.files import gguf_file
from dsi_workers.models.files import ModelError

#: Tokens that are drafted at once: what the documentation of llama-cpp-python advises for a CPU.
_LOOKUP_TOKENS, _DRAFTED_TOKENS = 2, 4
_POSITIONS, _MOST_ROWS = 2048, 512


class _Plain:
    """llama.cpp's own loop for one token after another."""

    def __init__(self, file: Path, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = _POSITIONS
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, prompt: list[int], max_tokens: int, stop: list[int]) -> dict[str, Any]:
        begun_s = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        tokens, times_ms, left = list[int](), list[float](), prompt
        while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop):
            for begin in range(0, len(left), _MOST_ROWS):
                part = left[begin : begin + _MOST_ROWS]
                rows = (llama_cpp.llama_token * len(part))(*part)
                if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(rows, len(part))):
                    raise EngineError(f"llama.cpp cannot decode {len(part)} tokens: give shorter prompts")
            tokens.append(int(llama_cpp.llama_sampler_sample(self._sampler, self._context, -1)))
            times_ms.append((time.perf_counter() - begun_s) * 1e3)
            left = tokens[-1:]
        return {"tokens": tokens, "times_ms": times_ms}


class _Drafter(LlamaDraftModel):  # type: ignore[misc]
    """Drafts with a model, greedily."""

    def __init__(self, file: Path, threads: int) -> None:
        self._model = llama_cpp.Llama(
            str(file), n_ctx=_POSITIONS, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        drafts = list[int]()
        for token in self._model.generate(input_ids.tolist(), temp=0.0):
            drafts.append(token)
            if len(drafts) == _DRAFTED_TOKENS:
                break
        return np.array(drafts, dtype=np.intc)


class _Assisted:
    """Speculation of llama-cpp-python."""

    def __init__(self, file: Path, threads: int, drafter: LlamaDraftModel) -> None:
        self._model = llama_cpp.Llama(
            str(file), n_ctx=_POSITIONS, n_threads=threads, n_threads_batch=threads, draft_model=drafter, verbose=False
        )

    def generate(self, prompt: list[int], max_tokens: int, stop: list[int]) -> dict[str, Any]:
        begun_s = time.perf_counter()
        self._model.reset()
        tokens, times_ms = list[int](), list[float]()
        for token in self._model.generate(prompt, temp=0.0):
            tokens.append(int(token))
            times_ms.append((time.perf_counter() - begun_s) * 1e3)
            if len(tokens) == max_tokens or token in stop:
                break
        return {"tokens": tokens, "times_ms": times_ms}


def _built(file: Path, drafts: Path, assist: str, threads: int) -> _Plain | _Assisted:
    if assist == "lookup":
        return _Assisted(file, threads, LlamaPromptLookupDecoding(num_pred_tokens=_LOOKUP_TOKENS))
    return _Assisted(file, threads, _Drafter(drafts, threads)) if assist else _Plain(file, threads)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsi_workers.benches.llama_cpp", description=__doc__)
    parser.add_argument("--model", required=True, metavar="REF")
    parser.add_argument("--quantization", default="none", metavar="KIND")
    parser.add_argument("--drafter", default="", metavar="REF")
    arguments = parser.parse_args()
    requests = read_requests()
    try:
        file = gguf_file(arguments.model, arguments.quantization, 1)
        drafts = gguf_file(arguments.drafter, "none", 1) if arguments.drafter else gguf_file(arguments.model, "q4_0", 1)
    except (ModelError, EngineError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    built: dict[tuple[str, int], _Plain | _Assisted] = {}
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    for request in requests:
        key = request.get("assist", ""), request["threads"]
        if key not in built:
            built[key] = _built(file, drafts, *key)
        answer = built[key].generate(request["generate"], request["max_tokens"], request["stop"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
