"""A model and its KV cache in llama.cpp, through the ctypes bindings of the package llama-cpp-python.

Import this module only where an engine is loaded: it imports llama_cpp, which the extra `llama-cpp` brings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import torch

from dsi_workers.engine import EngineError, Interrupt

#: How often it is asked, during a forward, whether that is still wanted.
_ASK_S = 0.002
#: Of ggml_log_level.
_ERROR = 4


class Row(NamedTuple):
    """An input of a forward. `wanted`: logits are computed after it."""

    token: int
    position: int
    sequence: int
    wanted: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """How a forward is computed, as far as the bits of its logits depend on it."""

    threads: int
    #: Whether attention goes along the keys position by position, in place of two matrix products.
    flash_attention: bool


class _Log:
    """Keeps llama.cpp's last error message: by default llama.cpp writes hundreds of lines to standard error."""

    def __init__(self) -> None:
        self.error = ""
        # The attribute keeps the callback alive: llama.cpp calls it as long as the process lives.
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            self.error = text.decode(errors="replace").strip()


_log: _Log | None = None


def _logged() -> _Log:
    global _log
    if _log is None:
        _log = _Log()
        llama_cpp.llama_backend_init()
    return _log


def build() -> str:
    """Names the build of llama.cpp, and the processor features that it uses."""
    _logged()
    return f"llama-cpp-python {llama_cpp.__version__} {llama_cpp.llama_print_system_info().decode().strip()}"


def write_quantized(source: Path, file: Path, kind: str, threads: int) -> None:
    """Write the GGUF file `source` with weights of another kind, such as F16, Q8_0 or Q4_0. Raises EngineError."""
    log = _logged()
    types = [getattr(llama_cpp, name, None) for name in (f"LLAMA_FTYPE_MOSTLY_{kind}", f"LLAMA_FTYPE_ALL_{kind}")]
    found = next((value for value in types if value is not None), None)
    if found is None:
        raise EngineError(f"llama.cpp has no weights of the kind {kind}: write f16, q8_0, q4_0 or another of its kinds")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = found, threads, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(parameters)):
        raise EngineError(f"llama.cpp cannot write {source.name} as {kind} ({log.error}): fetch the file again")


class Model:
    """The weights of a GGUF file. They stay quantized."""

    def __init__(self, file: Path) -> None:
        """Raises EngineError."""
        self._log = _logged()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.pointer = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        if not self.pointer:
            raise EngineError(
                f"llama.cpp cannot load {file} ({self._log.error}): fetch it again, or choose another model"
            )
        self.vocabulary_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.pointer)))
        self.trained_length = int(llama_cpp.llama_model_n_ctx_train(self.pointer))

    @property
    def keeps_a_state(self) -> bool:
        """Whether the model has a recurrent state, from which rejected positions cannot be removed."""
        return bool(llama_cpp.llama_model_is_recurrent(self.pointer) or llama_cpp.llama_model_is_hybrid(self.pointer))

    @property
    def position_bytes(self) -> int:
        """About how many bytes the keys and values of one position take, in float16."""
        heads, kv_heads = (
            max(1, int(count(self.pointer)))
            for count in (llama_cpp.llama_model_n_head, llama_cpp.llama_model_n_head_kv)
        )
        width = int(llama_cpp.llama_model_n_embd(self.pointer)) * kv_heads // heads
        return 4 * width * int(llama_cpp.llama_model_n_layer(self.pointer))

    def close(self) -> None:
        llama_cpp.llama_model_free(self.pointer)


class Context:
    """The KV cache of a model, and forwards that use it.

    Each sequence has a part of the cache to itself. Positions are stored in their order, one after another, as long as only the
    last ones are removed: so the sums of attention have the same order whatever was computed before.
    """

    def __init__(self, model: Model, settings: Settings, *, sequences: int, positions: int, rows: int) -> None:
        """`positions`: of each sequence. `rows`: the most of one forward. Raises EngineError."""
        self._vocabulary_size = model.vocabulary_size
        self._rows = rows
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = positions * sequences
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = rows
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.flash_attn_type = int(settings.flash_attention)
        parameters.kv_unified = False
        parameters.swa_full = True  # a window of attention would otherwise store positions in a ring
        self._pointer = llama_cpp.llama_init_from_model(model.pointer, parameters)
        if not self._pointer:
            raise EngineError(
                f"llama.cpp cannot make a KV cache for {sequences} slots of {positions} positions ({_logged().error}): give "
                "fewer slots or a smaller max_length"
            )
        self._memory = llama_cpp.llama_get_memory(self._pointer)
        self._batch = llama_cpp.llama_batch_init(rows, 0, 1)
        #: llama.cpp asks before each of some hundred operations whether to go on. A callback in Python would take a tenth of the
        #: forward. So it asks strlen: the length of this text is 0 as long as the forward is wanted.
        self._unwanted = ctypes.create_string_buffer(2)
        callback = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        llama_cpp.llama_set_abort_callback(self._pointer, callback, ctypes.addressof(self._unwanted))
        #: Forwards run in this thread, while the caller's asks whether they are wanted.
        self._thread = ThreadPoolExecutor(1, "llama.cpp")

    def length(self, sequence: int) -> int:
        """One past the last position that the sequence holds."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def cut(self, sequence: int, length: int) -> None:
        """Remove the positions of the sequence from `length` on."""
        if self.length(sequence) > length:
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def forward(self, rows: Sequence[Row], interrupt: Interrupt) -> torch.Tensor:
        """Compute the rows, store their keys and values, and return the logits of the wanted ones: [wanted rows, vocabulary].

        The positions of a sequence must follow those that it holds. Raises Interrupted, and whatever `interrupt` raises.
        """
        assert len(rows) <= self._rows
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, row in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = row.token, row.position, row.wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row.sequence
        if status := self._decode(interrupt):
            raise RuntimeError(f"llama_decode gave {status} for {len(rows)} rows: {_logged().error}")
        return self._logits(sum(row.wanted for row in rows))

    def close(self) -> None:
        self._thread.shutdown()
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._pointer)

    def _logits(self, count: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, self._vocabulary_size)
        found = torch.empty(count, self._vocabulary_size)
        source = llama_cpp.llama_get_logits(self._pointer)  # waits until the forward has ended
        ctypes.memmove(found.data_ptr(), source, found.nbytes)
        return found

    def _decode(self, interrupt: Interrupt) -> int:
        """Do the forward that `self._batch` describes, unless `interrupt` raises. Returns llama.cpp's status."""
        running = self._thread.submit(llama_cpp.llama_decode, self._pointer, self._batch)
        while True:
            wait([running], _ASK_S)
            try:
                interrupt.check()
            except BaseException:
                self._unwanted[0] = b"x"
                wait([running])
                self._unwanted[0] = b"\0"
                raise
            if running.done():
                return int(running.result())
