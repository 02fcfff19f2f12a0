"""The bodies of answers, in the shapes that OpenAI's clients read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsi_actors.serving.completions import Choice, Completion
from dsi_actors.serving.text import TokenText


@dataclass(slots=True)
class Bodies:
    """Of one request. `chat` tells the two endpoints apart."""

    model: str
    chat: bool
    logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completion: Completion) -> dict[str, Any]:
        choices = [self._choice(choice) for choice in completion.choices]
        return {**self._head("chat.completion"), "choices": choices, **self.accounting(completion)}

    def first_chunk(self, choice: Choice) -> dict[str, Any]:
        """What a chat's stream begins with."""
        return self._chunk(
            {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        )

    def chunk(self, choice: Choice, text: str, tokens: Sequence[TokenText]) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index, "finish_reason": None, "logprobs": self._logprobs(tokens)}
        return self._chunk({**body, "delta": {"content": text}} if self.chat else {**body, "text": text})

    def last_chunk(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
        return self._chunk({**body, "delta": {}} if self.chat else {**body, "text": ""})

    def usage_chunk(self, completion: Completion) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], **self.accounting(completion)}

    def accounting(self, completion: Completion) -> dict[str, Any]:
        prompt, generated = len(completion.job.prompt_ids), sum(choice.tokens for choice in completion.choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        return {"usage": usage, "dsi": [_cost(choice) for choice in completion.choices]}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        name = kind if self.chat else "text_completion"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        tokens = [token for piece in choice.pieces for token in piece.tokens]
        body = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": self._logprobs(tokens)}
        if self.chat:
            return {**body, "message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {**body, "text": choice.text}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {
                    "token": _readable(token.own), "logprob": token.logprob, "bytes": list(token.own),
                    "top_logprobs": [],
                }
                for token in tokens
            ]  # fmt: skip
            return {"content": content, "refusal": None}
        return {
            "tokens": [_readable(token.own, lead="bytes:") for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.offset for token in tokens],
        }


def _readable(own: bytes, *, lead: str = "") -> str:
    """The text of a token. One that is a part of a character is spelled as OpenAI does: \\xe2\\x82, after `lead`."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return lead + "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in own)


def _cost(choice: Choice) -> dict[str, Any]:
    """The extension: what the choice took, and the seed that gives it again. What was computed behind a stop string,
    until the cancel took effect, is a part of what it took."""
    report = choice.report
    if report is None:
        return {"seed": choice.seed}
    tokens = max(1, choice.tokens)
    return {
        "seed": choice.seed,
        "algorithm": report.algorithm,
        "sp": report.sp,
        "drafter": report.drafter,
        "lookahead": report.lookahead,
        "acceptance_rate": report.acceptance_rate,
        "alternatives": report.alternatives,
        "target_forwards": report.target_forwards,
        "wasted_target_forwards": report.wasted_target_forwards,
        "target_busy_ms_per_token": report.target_busy_ms / tokens,
        "drafter_busy_ms_per_token": report.drafter_busy_ms / tokens,
        "ms_per_token": report.ms_per_token,
        "first_token_ms": report.first_token_ms,
    }
