"""Compares a message with what the specification expects, field by field."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields

from dsi_protocol import Message

_MAX_CHARS = 300


@dataclass(frozen=True, slots=True)
class Condition:
    """What a field must fulfil where more than one value is right."""

    words: str
    holds: Callable[[object], bool]


def at_least(least: int) -> Condition:
    """A number that is not below `least`."""
    return Condition(f"at least {least}", lambda value: isinstance(value, int) and value >= least)


def at_most(most: int) -> Condition:
    """A number that is not above `most`."""
    return Condition(f"at most {most}", lambda value: isinstance(value, int) and value <= most)


def one_of(*values: object) -> Condition:
    """One of a few values."""
    return Condition("one of " + ", ".join(map(repr, values)), lambda value: value in values)


def items(least: int, most: int) -> Condition:
    """A list with at least `least` and at most `most` items."""
    number = str(least) if least == most else f"{least} to {most}"
    words = f"{number} {'item' if most == 1 else 'items'}"
    return Condition(words, lambda value: isinstance(value, Collection) and least <= len(value) <= most)


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of a message that is not as expected. Both values are worded for people."""

    field: str  #: such as Verified.start
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, found {self.found}"


class Nonconformance(Exception):
    """The worker did what the specification forbids, or did not do what it demands.

    `summary` is one sentence; `differences` are the fields that are not as expected, if a message came.
    """

    def __init__(self, summary: str, differences: Collection[Difference] = ()) -> None:
        super().__init__("; ".join([summary, *map(str, differences)]))
        self.summary = summary
        self.differences = tuple(differences)


class NotApplicable(Exception):
    """This worker need not be checked for this: it does not do what the check is about. The text says why."""


def require(message: Message, why: str, /, **expected: object) -> None:
    """Each of the named fields of `message` must have the value, or fulfil the Condition, that is given for it.

    `why` says in one sentence what the specification demands here. Raises Nonconformance with the fields that differ.
    """
    kind = type(message).__name__
    differences = [
        Difference(f"{kind}.{name}", _words(wanted), _words(getattr(message, name)))
        for name, wanted in expected.items()
        if not _fits(getattr(message, name), wanted)
    ]
    if differences:
        raise Nonconformance(why, differences)


def require_same(found: Message, expected: Message, why: str) -> None:
    """`found` must be the same message as `expected`. Raises Nonconformance with the fields that differ."""
    require_kind(found, type(expected), why)
    require(found, why, **{field.name: getattr(expected, field.name) for field in fields(expected)})


def require_kind(message: Message, kind: type[object], why: str) -> None:
    """`message` must be of this kind. Raises Nonconformance with the message that came instead."""
    if not isinstance(message, kind):
        raise Nonconformance(why, [Difference("message", kind.__name__, _words(message))])


def _fits(value: object, expected: object) -> bool:
    return expected.holds(value) if isinstance(expected, Condition) else value == expected


def _words(value: object) -> str:
    words = value.words if isinstance(value, Condition) else repr(value)
    return words if len(words) <= _MAX_CHARS else f"{words[:_MAX_CHARS]}..."
