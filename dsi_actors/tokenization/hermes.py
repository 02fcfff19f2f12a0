"""Tools in a chat whose template knows nothing of tools: written into messages, in the format of Hermes models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = """You may call functions to assist with the user query. Here are the functions within <tools></tools>:
<tools>
"""
_AFTER = """
</tools>
For each function call return a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <arguments-object>}
</tool_call>"""


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages as text alone: the tools in the first system message, calls in what the assistant says, and what tools
    answered in messages of the user."""
    found: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if found and found[-1]["role"] == "user" and found[-1]["content"].endswith("</tool_response>"):
                found[-1]["content"] += f"\n{content}"
                continue
        for call in message.get("tool_calls", ()):
            text = json.dumps(call["function"], ensure_ascii=False)
            content = f"{content}\n<tool_call>\n{text}\n</tool_call>".lstrip("\n")
        found.append({"role": role, "content": content})
    if tools:
        text = _BEFORE + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _AFTER
        if found[0]["role"] == "system":
            found[0]["content"] += f"\n\n{text}"
        else:
            found.insert(0, {"role": "system", "content": text})
    return found
