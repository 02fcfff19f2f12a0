"""The orchestrator inside your own program: target servers and a drafter on this machine, one question.

python examples/embed.py "Why is the sky blue?"
"""

from __future__ import annotations

import asyncio
import sys

import dsi_actors


async def main(question: str, target: str) -> None:
    config = dsi_actors.Config(target=target)  # its own int8 copy is the drafter
    async with dsi_actors.Orchestrator(config) as orchestrator:
        async for text in orchestrator.generate_text(question, max_tokens=64):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    question = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    asyncio.run(main(question, sys.argv[2] if len(sys.argv) > 2 else dsi_actors.Config().target))
