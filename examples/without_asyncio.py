"""Questions from a script or a notebook, without asyncio: a whole answer, one as it comes, and one of a given form.

python examples/without_asyncio.py
python examples/without_asyncio.py your/model
"""

from __future__ import annotations

import sys

import dsi_actors


def main(target: str) -> None:
    say = sys.stdout.write
    with dsi_actors.open(target=target) as model:  # or model = dsi_actors.open(...), and model.close() at the end
        answer = model.answer("Why is the sky blue?", max_tokens=64)
        say(f"{answer}\n({len(answer.token_ids)} tokens, {answer.report.ms_per_token:.1f} ms per token)\n\n")

        messages = [
            {"role": "system", "content": "Answer in one line."},
            {"role": "user", "content": "Name three rivers."},
        ]
        for text in model.generate_text(messages, max_tokens=64, stop="\n"):
            say(text)
            sys.stdout.flush()

        form = dsi_actors.Structure.choice(["yes", "no"])
        say(f"\n\n{model.answer('Is water wet?', structure=form)}\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else dsi_actors.Config().target)
