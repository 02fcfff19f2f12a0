"""Runs transformers itself, in a separate process, for benchmarks that compare with it.

`python -m dsi_workers.benches.reference --model REF` reads one JSON request per line and writes one JSON answer per line:

    {"generate": [ids], "max_tokens": n, "stop": [ids], "threads": n, "assist": ""}
        -> {"tokens": [ids], "times_ms": [since the request]}
    {"distance": [ids], "start": n, "temperature": t, "seed": s}
        -> {"total_variation": [...], "ranks": [...], "confidences": [...]}, one for each token from start on

`generate` is transformers' own greedy loop, with its own KV cache and masks. With `assist`, it is transformers' assisted
generation: "lookup" is prompt lookup in the text so far, "drafter" uses the model of --drafter. `distance` also needs --drafter.
`ranks` says which choice of the drafter the token is (1: its first) under the noise of the seed, and `confidences` is the
drafter's probability of its first choice. At temperature 0, which is greedy, the list `total_variation` is empty. --layers keeps
only the first layers of the drafter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from dsi_protocol.gumbel import stream_key
from dsi_workers.benches.requests import read_requests
from dsi_workers.checkpoints.library import read_config
from dsi_workers.checkpoints.load import keep_layers
from dsi_workers.decoding.packing import replace_linear_layers
from dsi_workers.decoding.quantization import quantize_int8, quantized_dtype
from dsi_workers.engine import EngineError
from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model
from dsi_workers.sampling import gumbel_noise

#: Tokens that prompt lookup drafts at once, as in transformers' documentation.
_LOOKUP_TOKENS = 10
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Clock(StoppingCriteria):
    """A stopping criterion that never stops. It records when tokens arrive; assisted generation gives several at once."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.times_ms: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.times_ms.append((time.perf_counter() - self.begun) * 1e3)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class Reference:
    """A target and a drafter, both run by transformers."""

    def __init__(self, model: str, drafter: str, dtype: str, device: torch.device, layers: int | None = None) -> None:
        self._device = device
        self._target = self._load(model, _DTYPES[dtype])
        self._drafter: Any = None
        if drafter in ("self-int8", "self-int4"):  # instead of a copy in 4 bits, too
            self._drafter = self._load(model, quantized_dtype(device), layers)
            replace_linear_layers(self._drafter, quantize_int8)
        elif drafter:
            self._drafter = self._load(drafter, _DTYPES[dtype], layers)

    def _load(self, model: str, dtype: torch.dtype, layers: int | None = None) -> Any:
        directory = resolve_model(model)
        config = read_config(directory, model)
        keep_layers(config.get_text_config(decoder=True), layers, model)
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        return loaded.eval().to(self._device)

    def generate(
        self, prompt_ids: list[int], max_tokens: int, stop: list[int], assist: str = "", threads: int | None = None
    ) -> dict[str, Any]:
        if threads is not None:
            torch.set_num_threads(threads)
        assistance: dict[str, Any] = {
            "": {}, "lookup": {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}, "drafter": {"assistant_model": self._drafter},
        }[assist]  # fmt: skip
        clock = _Clock()
        output = self._target.generate(
            torch.tensor([prompt_ids], device=self._device),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=self._device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **assistance,
        )
        return {"tokens": output[0, len(prompt_ids) :].tolist(), "times_ms": clock.times_ms}

    @torch.inference_mode()
    def distance(self, tokens: list[int], start: int, temperature: float, seed: int) -> dict[str, Any]:
        """Compare target and drafter at each token from `start` on.

        Returns the total variation distance of their distributions, which choice of the drafter the token is, and the drafter's
        probability of its first choice.
        """
        ids = torch.tensor([tokens], device=self._device)
        drafted = self._drafted_logits(ids, start).float()
        distances: list[float] = []
        if temperature > 0:
            logits = self._target(ids).logits[0, start - 1 : -1].float()
            target, drafter = ((each / temperature).softmax(dim=-1) for each in (logits, drafted))
            distances = ((target - drafter).abs().sum(dim=-1) / 2).tolist()
        ranks, confidences = list[int](), list[float]()
        for position, row in enumerate(drafted, start=start):
            scores = row.double()
            if temperature > 0:
                words = torch.arange(len(row), device=row.device)
                scores = row.double() / temperature + gumbel_noise(stream_key(seed, position), words)
            ranks.append(1 + int((scores > scores[tokens[position]]).sum()))
            confidences.append(float((row / (temperature or 1.0)).softmax(dim=-1)[scores.argmax()]))
        return {"total_variation": distances, "ranks": ranks, "confidences": confidences}

    def _drafted_logits(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """The drafter's logits, computed one token at a time as in drafting.

        With int8 inputs, the rows of a product share one scale, so other rows would change the logits.
        """
        cache, logits = DynamicCache(), []
        for begin, end in [(0, start), *((place, place + 1) for place in range(start, ids.shape[1] - 1))]:
            logits.append(self._drafter(ids[:, begin:end], past_key_values=cache).logits[0, -1:])
        return torch.cat(logits)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsi_workers.benches.reference", description=__doc__)
    parser.add_argument("--model", required=True, metavar="REF")
    parser.add_argument("--drafter", default="", metavar="REF")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=sorted(_DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu:0")
    arguments = parser.parse_args()
    requests = read_requests()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        reference = Reference(
            arguments.model, arguments.drafter, arguments.dtype, torch.device(arguments.device), arguments.layers
        )
    except (ModelError, EngineError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    for request in requests:
        if "generate" in request:
            answer = reference.generate(
                request["generate"],
                request["max_tokens"],
                request["stop"],
                request.get("assist", ""),
                request.get("threads"),
            )
        else:
            answer = reference.distance(request["distance"], request["start"], request["temperature"], request["seed"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
