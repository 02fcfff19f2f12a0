"""A language model of counts: which token followed the last two tokens, the last one, or any, in the file text.txt."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dsi_protocol import OptionValue
from dsi_workers.backend import Backend, Run
from dsi_workers.engine import Engine, EngineError, Interrupt
from dsi_workers.engines.model import ModelEngine
from dsi_workers.models.files import read_tokenizer, read_vocabulary_hash
from dsi_workers.models.resolve import resolve_model


class TrigramBackend(Backend):
    max_length, slots, window, most_rows = 2048, 8, 16, 128

    def __init__(self, text: Path, words: Path) -> None:
        tokenizer = read_tokenizer(words)
        self.vocabulary, self.vocabulary_size = read_vocabulary_hash(words), tokenizer.get_vocab_size()
        self.forwards = 0
        # In place of keys and values: the input at each position of each slot. A later run overwrites what was rejected.
        self.inputs = [[0] * (self.max_length + self.prompt_chunk) for _ in range(self.slots)]
        self.followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        tokens = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        for position, token in enumerate(tokens):
            for order in range(min(position, 2) + 1):
                self.followers[tuple(tokens[position - order : position])][token] += 1

    def compute(self, runs: Sequence[Run], interrupt: Interrupt) -> list[torch.Tensor]:
        self.forwards += 1
        return [self.logits(run, interrupt) for run in runs]

    def logits(self, run: Run, interrupt: Interrupt) -> torch.Tensor:
        inputs, found = self.inputs[run.slot], torch.zeros(len(run.wanted), self.vocabulary_size)
        inputs[run.begin : run.begin + len(run.tokens)] = run.tokens
        for row, position in enumerate(run.wanted):  # One by one: so the bits of a row do not depend on the other rows.
            interrupt.check()
            found[row] = self.chances(inputs[max(0, position - 1) : position + 1]).log()
        return found

    def chances(self, last: list[int]) -> torch.Tensor:
        mixed = torch.full((self.vocabulary_size,), 0.01 / self.vocabulary_size)
        for order, share in enumerate((0.04, 0.25, 0.7)[: len(last) + 1]):
            if counts := self.followers.get(tuple(last[len(last) - order :])):
                mixed[list(counts)] += share * torch.tensor(list(counts.values())) / counts.total()
        return mixed


def trigrams(*, role: str, model: str, device: str, options: Mapping[str, OptionValue]) -> Engine:
    if not (text := Path(model) / "text.txt").is_file():
        raise EngineError(f"there is no {text}: give a directory with a text.txt that the engine trigrams learns from")
    words = resolve_model(str(options.get("target", model)), tokenizer_only=True)  # A drafter uses the target's tokens.
    torch.set_num_threads(1)  # Several workers share a machine.
    backend = TrigramBackend(text, words)
    return ModelEngine(backend, exact=role == "target", calibrate=options.get("calibrate") is not False)
