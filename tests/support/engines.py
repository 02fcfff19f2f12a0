"""Test support: an engine's interrupt, a socket without a network, a small real model made on the spot."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsi_protocol import Draft, FromWorker, Goodbye, Message
from dsi_workers.engine import Engine, EngineInfo, Interrupt, Interrupted, Task
from dsi_workers.loop import IDLE_S
from dsi_workers.session import Session
from dsi_workers.tree import Walk

if TYPE_CHECKING:
    from dsi_workers.decoding.torch_backend import TorchBackend


class NoInterrupt:
    """Nothing interrupts, and waiting takes no time."""

    def check(self) -> None:
        pass

    def wait_until(self, deadline_s: float) -> None:
        pass


class InterruptAfter(NoInterrupt):
    """Interrupts at the `checks`-th look."""

    def __init__(self, checks: int) -> None:
        self.left = checks

    def check(self) -> None:
        if self.left == 0:
            raise Interrupted
        self.left -= 1


class ScriptedSocket:
    """Stands for WorkSocket: what is in `inbox` arrives one by one, then, to a worker that is idle, Goodbye."""

    def __init__(self) -> None:
        self.inbox: deque[Message] = deque()
        self.sent: list[FromWorker] = []

    def send(self, message: FromWorker) -> None:
        self.sent.append(message)

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        if self.inbox:
            return self.inbox.popleft()
        return Goodbye("done") if timeout_s >= IDLE_S else None


def role_for(messages: Iterable[Message]) -> str:
    """The role of the worker to which one would send these messages."""
    return "drafter" if any(isinstance(message, Draft) for message in messages) else "target"


class CountingEngine(Engine):
    """Its next token is always the last one plus one, and its second choice 100 more. Runs `during` (once) in the middle of
    each call."""

    def __init__(self) -> None:
        self.info = EngineInfo("count", 1000, 64, 8, 1, slots=3, rows=8)
        #: The generations that shared each step.
        self.batches: list[list[int]] = []
        self.during: deque[list[Message]] = deque()
        self.socket: ScriptedSocket | None = None
        self.forgotten: list[int] = []

    def step(self, tasks: Sequence[Task], interrupt: Interrupt) -> None:
        self.forwards += 1
        self.batches.append([task.session.generation for task in tasks])
        if self.during and self.socket is not None:
            self.socket.inbox.extend(self.during.popleft())
        interrupt.check()
        for task in tasks:
            self._count(task)

    def _count(self, task: Task) -> None:
        tokens, answer = task.session.tokens, task.answer.tokens
        walk = Walk(tokens, task.branches if task.count is None else (), task.start)
        answer.append(tokens[task.start - 1] + 1)
        while walk.takes(answer[-1]):
            answer.append(answer[-1] + 1)
        if task.alternatives:
            task.answer.alternatives = [answer[0] + 100]
            task.answer.continued = [branch.tokens[-1] + 1 for branch in task.branches]
        task.done = True

    def forget(self, session: Session) -> None:
        self.forgotten.append(session.generation)


def session_of(tokens: Sequence[int], *, prompt_length: int | None = None, generation: int = 1) -> Session:
    session = Session(generation, len(tokens) if prompt_length is None else prompt_length, "test")
    session.write(0, tokens)
    return session


#: The token that ends a text of the model of bytes.
END = 256


def make_byte_model(directory: Path, *, positions: int = 512) -> Path:
    """A random Llama whose tokens are the 256 bytes and END, with a chat template: it can write any text."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    make_tiny_model(directory, words=END + 1, positions=positions)
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END}), encoding="utf-8")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def make_tiny_model(
    directory: Path, *, words: int = 96, sliding_window: int | None = None, positions: int = 512, kv_heads: int = 1
) -> Path:
    """A random Llama (or Mistral, with a sliding window) of a few thousand weights, with a tokenizer.

    Our kernels for CPUs compute it with one KV head. With more, heads are too small for them.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": words, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
    }  # fmt: skip
    torch.manual_seed(5)
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if sliding_window is None
        else MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window))
    )
    for parameter in model.parameters():  # wide logits: no two are nearly equal
        parameter.data.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def torch_backend(engine: Engine) -> TorchBackend:
    """The backend of a model engine of our own."""
    from dsi_workers.decoding.torch_backend import TorchBackend
    from dsi_workers.engines.model import ModelEngine

    assert isinstance(engine, ModelEngine)
    assert isinstance(engine._backend, TorchBackend)
    return engine._backend
