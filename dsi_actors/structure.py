"""Structured output: a grammar that an answer must follow, checked when it is made."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsi_actors.errors import ConfigError
from dsi_protocol.fields import MAX_LONG_TEXT_BYTES

#: Between the parts of a JSON value stands at most one space: a small model would otherwise write spaces for ever.
_JSON_OPTIONS: Any = {"whitespace_pattern": "[ ]?"}


@dataclass(frozen=True, slots=True)
class Structure:
    """What an answer must be. Make it by one of the functions of this class. All of them raise ConfigError.

    `grammar`: the grammar in the form that llguidance takes. It is checked here, before any work: it can be followed, is not
    contradictory, and not too large.
    """

    grammar: str

    def __post_init__(self) -> None:
        size = len(self.grammar.encode(errors="replace"))
        if size > MAX_LONG_TEXT_BYTES:
            raise ConfigError(f"the structure has {size} bytes, over the limit of {MAX_LONG_TEXT_BYTES}")
        if problem := _library("the structure", lambda matcher: str(matcher.validate_grammar(self.grammar))):
            raise ConfigError(f"the structure cannot be used: {' '.join(problem.split())[:500]}")
        if problem := _problem_at_the_beginning(self.grammar):
            raise ConfigError(f"the structure cannot be used: {problem}")

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Structure:
        """A JSON value that the schema allows. A part of JSON Schema that cannot be kept to is an error."""
        text = schema if isinstance(schema, str) else _as_json(schema)
        return cls(
            _library("json_schema", lambda matcher: matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))
        )

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """A text that the regular expression matches as a whole. The syntax is that of Rust's crate regex."""
        return cls(_library("regex", lambda matcher: matcher.grammar_from_regex(pattern)))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Structure:
        """One of these texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError("a choice needs a list of texts, none of them empty")
        options = " | ".join(_as_json(text) for text in texts)
        return cls(_library("choice", lambda matcher: matcher.grammar_from_lark(f"start: {options}")))

    @classmethod
    def lark(cls, grammar: str) -> Structure:
        """A text of this context-free grammar, in Lark's syntax as llguidance has it, or in GBNF."""
        return cls(_library("grammar", lambda _: _grammar_from(grammar)))

    @classmethod
    def tool_calls(
        cls, functions: Mapping[str, Mapping[str, Any]], *, most: int, otherwise: Mapping[str, Any] | None = None
    ) -> Structure:  # fmt: skip
        """Between one and `most` calls of functions, as Hermes models write them; or JSON of the schema `otherwise`, if given.

        `functions`: for each name the JSON schema of its arguments."""
        if not functions:
            raise ConfigError("tool calls need at least one function")
        names = [f"call{place}" for place in range(len(functions))]
        rules = ["start: calls | json" if otherwise is not None else "start: calls"]
        rules.append(f'calls: call ("\\n" call){{0,{most - 1}}}' if most > 1 else "calls: call")
        rules.append(f"call: {' | '.join(names)}")
        for rule, (name, schema) in zip(names, functions.items(), strict=True):
            before = _as_json(f'<tool_call>\n{{"name": {_as_json(name)}, "arguments": ')
            rules.append(f"{rule}: {before} {rule}_arguments {_as_json('}' + chr(10) + '</tool_call>')}")
            rules.append(f"{rule}_arguments: %json {_with_options(schema)}")
        if otherwise is not None:
            rules.append(f"json: %json {_with_options(otherwise)}")
        return cls(_library("tools", lambda matcher: matcher.grammar_from_lark("\n".join(rules))))


def _with_options(schema: Mapping[str, Any]) -> str:
    return _as_json({**schema, "x-guidance": _JSON_OPTIONS})


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema is no JSON: {error}") from None


def _library(name: str, make: Callable[[Any], str]) -> str:
    """What `make` gives for the library's class. Raises ConfigError."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ConfigError("structured output needs llguidance: pip install 'dsi-actors[structure]'") from None
    try:
        return make(LLMatcher)
    except ValueError as error:
        raise ConfigError(f"the structure cannot be used: {name}: {error}") from None


def _problem_at_the_beginning(grammar: str) -> str:
    """Why no answer can begin. "" if one can. Found by following the grammar, as a worker does: so also a grammar that is too
    complex is refused here."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes_as_tokens(), grammar, log_level=0)
    if matcher.is_error():
        return " ".join(matcher.get_error().split())[:500]
    begins = any(matcher.compute_bitmask())
    if matcher.is_error() or not (begins or matcher.is_accepting()):
        return f"no text can follow it ({matcher.get_error().partition(chr(10))[0] or 'nothing is allowed'})"
    return ""


@functools.cache
def _bytes_as_tokens() -> Any:
    """A tokenizer with a token for each byte: what a grammar allows at all does not depend on a model's tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _grammar_from(grammar: str) -> str:
    from llguidance import grammar_from

    return grammar_from("grammar", grammar)
