"""The orchestrator inside your own program: two target servers and a drafter on this machine, one prompt.

python examples/embed.py "Why is the sky blue?"
"""

from __future__ import annotations

import asyncio
import sys

import dsi_actors
from dsi_actors.models import resolve_model
from dsi_actors.tokenizer import Tokenizer


async def main(question: str) -> None:
    config = dsi_actors.Config()  # SmolLM2, its own int8 copy as drafter, two target servers
    tokenizer = Tokenizer(await resolve_model(config.target))
    prompt_ids = tokenizer.encode_chat([{"role": "user", "content": question}])
    sampling = dsi_actors.Sampling(max_tokens=64, stop_token_ids=tokenizer.stop_token_ids)
    async with dsi_actors.Orchestrator(config) as orchestrator:
        text = tokenizer.stream()
        async for tokens in orchestrator.generate(prompt_ids, sampling):
            sys.stdout.write("".join(text.add(token) for token in tokens))
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"))
