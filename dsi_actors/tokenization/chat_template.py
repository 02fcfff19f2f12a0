"""A model's chat template. It comes with the model, from anywhere: it runs in Jinja's sandbox, within bounds."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dsi_actors.errors import ConfigError
from dsi_actors.tokenization.library import in_one_line

#: Of processor time, for one conversation. Usual templates take milliseconds.
_MOST_SECONDS = 2.0
#: What a template may add to the text of the messages, and how often it may repeat that text.
_MOST_ADDED_CHARACTERS, _MOST_REPEATS = 1 << 20, 4
#: Of a sequence that is repeated by `*`, and bits of a product or a power.
_MOST_ITEMS, _MOST_BITS = 1 << 20, 1 << 12
#: What the template reads that no option may name.
_OWN_NAMES = {
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token",
    "raise_exception", "strftime_now",
}  # fmt: skip


class ChatTemplate:
    """From the messages of a conversation to text. Threads may share it."""

    def __init__(self, source: str) -> None:
        self.source = source
        #: The names of what it reads: messages, tools, enable_thinking and so on.
        self.reads: frozenset[str] = frozenset()
        self._environment = _Environment()
        self._template: jinja2.Template | None = None
        try:
            tree = self._environment.parse(source)
            self.reads = frozenset(jinja2.meta.find_undeclared_variables(tree))
            _check_time_in_loops(tree)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except Exception as error:  # text without a template still works: whoever renders hears of it
            self._problem = in_one_line(error)

    def render(
        self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], *,
        tools: Sequence[Mapping[str, Any]] = (), options: Mapping[str, Any] | None = None, answer_begins: bool = True,
    ) -> str:  # fmt: skip
        """The text of a conversation, up to where the answer begins unless `answer_begins` is False.

        `tools`: those that may be called. `options`: what else the template reads, by name. Raises ConfigError, whatever the
        template does."""
        if self._template is None:
            raise _failure(self._problem)
        options = dict(options or {})
        for name in options:
            if name not in self.reads or name in _OWN_NAMES:
                raise ConfigError(f"the model's chat template reads no {name}: leave it out")
        room = _MOST_ADDED_CHARACTERS + _MOST_REPEATS * _characters([messages, tools, options])
        pieces: list[str] = []
        given = {"messages": copy.deepcopy(list(messages)), "add_generation_prompt": answer_begins}
        given |= {"tools": copy.deepcopy(list(tools)) or None, "documents": None, **special_tokens, **options}
        self._environment.start_clock()
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise _OutOfBounds("it writes without an end")
        except Exception as error:
            raise _failure(in_one_line(error)) from None
        return "".join(pieces)


def _characters(value: Any) -> int:
    """Of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _characters(inner) for key, inner in value.items())
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 8


class _OutOfBounds(Exception):
    """The template asks for more than a template needs."""


def _failure(problem: str) -> ConfigError:
    return ConfigError(f"the model's chat template failed ({problem}): give it plain text")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with what transformers gives to templates. The sandbox itself bounds `range`."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters["tojson"] = _to_json
        self._clock = threading.local()

    def start_clock(self) -> None:
        """For the thread that calls."""
        self._clock.end_s = time.thread_time() + _MOST_SECONDS

    def check_time(self) -> bool:
        if time.thread_time() > self._clock.end_s:
            raise _OutOfBounds(f"it takes more than {_MOST_SECONDS:g} s")
        return True

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        factors = [left, right]
        if all(isinstance(factor, int) for factor in factors):
            bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise _OutOfBounds("it computes with numbers that are too large")
        elif operator == "*":
            for sequence, count in (factors, factors[::-1]):
                if isinstance(count, int) and hasattr(sequence, "__len__") and len(sequence) * count > _MOST_ITEMS:
                    raise _OutOfBounds("it makes a text or a list that is too long")
        return super().call_binop(context, operator, left, right)


def _check_time_in_loops(tree: jinja2.nodes.Template) -> None:
    """Whatever is repeated looks at the clock each time: loops, their filters, macros that call each other."""

    def check() -> jinja2.nodes.Call:
        return jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("check_time"), [], [], None, None)

    for loop in list(tree.find_all(jinja2.nodes.For)):
        loop.body.insert(0, jinja2.nodes.ExprStmt(check()))
        if loop.test is not None:
            loop.test = jinja2.nodes.And(check(), loop.test)
    for macro in list(tree.find_all(jinja2.nodes.Macro)):
        macro.body.insert(0, jinja2.nodes.ExprStmt(check()))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the model's own words for training: here it is its content."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
