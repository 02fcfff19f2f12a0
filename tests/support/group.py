"""Test support: small models whose parts are uneven, and the ranks of a group as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional

from dsi_actors.config import Config
from dsi_workers.decoding.share import Share

_Value = TypeVar("_Value")


def config_of_a_group(model: Path, **more: Any) -> Config:
    """One target server that divides the model between two processes on the CPU, and no drafter."""
    return Config(
        target=str(model), drafter=None, sp=1, tp=2, devices=("cpu",), calibrate=False, target_options={"max_length": 128},
        ready_timeout_s=600, request_timeout_s=600, target_wait_s=600, **more,
    )  # fmt: skip


def make_uneven_model(directory: Path, *, tied: bool = True, positions: int = 512) -> Path:
    """A random Llama in files of 40 KB: 9 heads that share 3 KV heads, as SmolLM2-135M has, and 97 tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=72, intermediate_size=80, num_hidden_layers=2, num_attention_heads=9,
            num_key_value_heads=3, head_dim=8, max_position_embeddings=positions, tie_word_embeddings=tied,
            attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():  # wide logits: no two are nearly equal
        parameter.data.normal_(std=0.2) if name.endswith("bias") else parameter.data.mul_(4.0)
    model.save_pretrained(directory, max_shard_size="40KB")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


class ThreadRanks:
    """One rank of a group of threads: plain sums in the order of ranks (decoding/ranks.py)."""

    def __init__(self, share: Share, tables: list[torch.Tensor | None], meeting: threading.Barrier) -> None:
        self.share = share
        self._tables = tables
        self._meeting = meeting

    def _all(self, own: torch.Tensor) -> Sequence[torch.Tensor]:
        self._tables[self.share.rank] = own
        self._meeting.wait()
        found = [each for each in self._tables if each is not None]
        self._meeting.wait()
        return found

    def embed(self, ids: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, torch.cat(list(self._all(embedding))))

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(partial.shape)
        for part in self._all(partial):
            total = total + part.float()
        return total.to(partial.dtype)

    def join(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self._all(logits)), dim=1)


def of_each_rank(degree: int, work: Callable[[ThreadRanks], _Value]) -> list[_Value]:
    """Do `work` once for each rank, at the same time. Returns what each gives."""
    meeting, tables = threading.Barrier(degree), list[torch.Tensor | None]([None] * degree)

    def guarded(ranks: ThreadRanks) -> _Value:
        try:
            return work(ranks)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(degree) as pool:
        return list(pool.map(guarded, [ThreadRanks(share, tables, meeting) for share in Share(0, degree).all()]))
