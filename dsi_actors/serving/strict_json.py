"""JSON from strangers: strict, bounded in depth and number of values, and read without holding up other threads.

The standard library's scanner in C holds the interpreter's lock until it is done, for a quarter of a second where a megabyte
holds many small values. Its twin in Python can be interrupted by other threads at any value, and asks this module about each.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeAlias

#: An object in an array in an object is a depth of three. OpenAI's requests have at most eight or so.
_MOST_DEPTH = 64
#: More than any number of 64 bits has.
_MOST_DIGITS = 40

_Scan: TypeAlias = Callable[[str, int], tuple[Any, int]]


def loads(text: str, *, most_values: int) -> Any:
    """The value that `text` stands for. Raises ValueError, whose words say what is wrong.

    Refused beyond what the standard library refuses: a key that occurs twice in one object, text that is half of a UTF-16
    pair, NaN and infinite numbers, numbers of more than 40 digits, deep nesting, and more than `most_values` values.
    """
    return _Decoder(most_values).decode(text)


class _Decoder(json.JSONDecoder):
    def __init__(self, most_values: int) -> None:
        super().__init__(
            object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
        )
        self._most_values = self._values_left = most_values
        self._depth = 0
        standard: Any = json.decoder  # what its own decoder is made of
        self._scan_array, self._scan_object = standard.JSONArray, standard.JSONObject
        self._scan_string = standard.scanstring
        self.parse_array, self.parse_object, self.parse_string = self._array, self._members, self._text
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _array(self, place: tuple[str, int], scan: _Scan) -> tuple[list[Any], int]:
        self._enter()
        found: tuple[list[Any], int] = self._scan_array(place, partial(self._value, scan))
        self._depth -= 1
        return found

    def _members(self, place: tuple[str, int], strict: bool, scan: _Scan, *hooks: Any) -> tuple[dict[str, Any], int]:
        self._enter()
        found: tuple[dict[str, Any], int] = self._scan_object(place, strict, partial(self._value, scan), *hooks)
        self._depth -= 1
        return found

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise ValueError(f"values are nested deeper than {_MOST_DEPTH}")

    def _value(self, scan: _Scan, text: str, at: int) -> tuple[Any, int]:
        self._values_left -= 1
        if self._values_left < 0:
            raise ValueError(f"there are more than {self._most_values} values")
        return scan(text, at)

    def _text(self, text: str, at: int, strict: bool) -> tuple[str, int]:
        found, end = self._scan_string(text, at, strict)
        return _whole(found), end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    for key in found:
        _whole(key)
    return found


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "a text holds half of a UTF-16 pair (a lone surrogate, such as \\ud83d): send whole characters"
        ) from None
    return text


def _integer(digits: str) -> int:
    return int(_short(digits))


def _float(digits: str) -> float:
    number = float(_short(digits))
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits} is too large")
    return number


def _short(digits: str) -> str:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
    return digits


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
