"""Are AR, SI and DSI the same token for token, and the same as transformers' own greedy `generate` in float32?

    python examples/compare_with_transformers.py PROMPTS.jsonl --limit 20 --max-tokens 64

Each line of PROMPTS.jsonl is {"id": ..., "prompt": ...}. Where the text differs from transformers' the two logits that
decided are shown: two computations of the same sum in another order differ by about 1e-4, and may break a tie.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dsi_actors
from dsi_actors.config import ALGORITHMS, DEFAULT_TARGET
from dsi_actors.models import resolve_model
from dsi_actors.tokenizer import Tokenizer


class Reference:
    """transformers' greedy `generate` in float32 on one thread."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(self, prompt_ids: list[int], max_tokens: int, stop: tuple[int, ...]) -> list[int]:
        output = self._model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=list(stop),
            pad_token_id=stop[0] if stop else 0,
        )
        found: list[int] = output[0, len(prompt_ids) :].tolist()
        return found

    def margin(self, prefix: list[int]) -> float:
        """How far the best logit after `prefix` is above the second."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prefix])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        return float(best - second)


def read_prompts(file: str, limit: int) -> list[dict[str, str]]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()[:limit]
    return [json.loads(line) for line in lines]


async def main(arguments: argparse.Namespace) -> int:
    directory = await resolve_model(arguments.target)
    tokenizer = Tokenizer(directory)
    prompts = read_prompts(arguments.prompts, arguments.limit)
    sampling = dsi_actors.Sampling(max_tokens=arguments.max_tokens, stop_token_ids=tokenizer.stop_token_ids)
    config = dsi_actors.Config(target=arguments.target, drafter=arguments.drafter, sp=arguments.sp)
    reference = Reference(directory)
    among_us = tied = differing = total = 0
    async with dsi_actors.Orchestrator(config) as orchestrator:
        for case in prompts:
            prompt_ids = tokenizer.encode(case["prompt"])
            outputs: list[list[int]] = []
            for algorithm in ALGORITHMS:
                stream = orchestrator.generate(prompt_ids, sampling, algorithm=algorithm)
                outputs.append([token async for tokens in stream for token in tokens])
            expected = reference.generate(prompt_ids, arguments.max_tokens, tokenizer.stop_token_ids)
            among_us += any(output != outputs[0] for output in outputs)
            total += len(outputs[0])
            verdict = "same"
            if outputs[0] != expected:
                pairs = zip(outputs[0], expected, strict=False)
                at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), 0)
                margin = reference.margin(prompt_ids + expected[:at])
                tied += margin < 1e-4
                differing += margin >= 1e-4
                verdict = f"differs from transformers at token {at}, where the logits are {margin:.1e} apart"
            sys.stdout.write(f"{case['id']}: {len(prompt_ids)} prompt tokens, {len(outputs[0])} tokens, {verdict}\n")
            sys.stdout.flush()
    sys.stdout.write(
        f"{len(prompts)} prompts, {total} tokens: AR, SI and DSI differ on {among_us}; different from transformers "
        f"on {differing}, and on {tied} more where two logits are tied to 1e-4\n"
    )
    return 1 if among_us or differing else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", metavar="PROMPTS.jsonl")
    parser.add_argument("--target", default=DEFAULT_TARGET, metavar="REF")
    parser.add_argument("--drafter", default="self-int8", metavar="REF")
    parser.add_argument("--sp", type=int, default=2, metavar="N")
    parser.add_argument("--limit", type=int, default=20, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="M")
    sys.exit(asyncio.run(main(parser.parse_args())))
