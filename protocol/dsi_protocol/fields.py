"""The types of message fields (SPEC.md section 3): how each is packed for msgpack, and checked when it is unpacked.

`kind.pack(value)` returns an object that msgpack can write. `kind.unpack(object)` returns the value, or raises ValueError
with a clause that says what is wrong. What `unpack` returns needs no further check of its type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, Protocol, TypeAlias, get_type_hints

MAX_TEXT_BYTES = 4096
MAX_LONG_TEXT_BYTES = 1 << 18
MAX_TOKENS_PER_MESSAGE = 1 << 18
MAX_OPTIONS = 64
MAX_TOKEN_LISTS = 1024


class Kind(Protocol):
    """The type of a field. `pack` and `unpack` raise ValueError."""

    def pack(self, value: object) -> object: ...
    def unpack(self, wire: object) -> object: ...


class Unsigned:
    """An unsigned integer of `bits` bits. msgpack chooses the width on the wire. A bool is not accepted as an integer."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.limit = 1 << bits

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> int:
        if type(wire) is not int:
            raise ValueError(f"expected an unsigned integer, got {_kind_name(wire)}")
        if not 0 <= wire < self.limit:
            raise ValueError(f"{wire} does not fit {self.bits} bits unsigned")
        return wire


class Boolean:
    """True or false."""

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> bool:
        if type(wire) is not bool:
            raise ValueError(f"expected a boolean, got {_kind_name(wire)}")
        return wire


class Double:
    """A finite number of at most 2^53 in size: float 32, float 64 or an integer on the wire."""

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> float:
        if type(wire) not in (float, int):
            raise ValueError(f"expected a number, got {_kind_name(wire)}")
        assert isinstance(wire, float | int)
        if not -(2.0**53) <= wire <= 2.0**53:
            raise ValueError(f"{wire} is not a finite number of ordinary size")
        return float(wire)


class PackedFloats:
    """A list of finite single-precision numbers, packed little-endian into a msgpack bin."""

    def pack(self, value: object) -> bytes:
        if type(value) is not tuple or len(value) > MAX_TOKENS_PER_MESSAGE:
            raise ValueError(f"expected a tuple of at most {MAX_TOKENS_PER_MESSAGE} numbers")
        try:
            packed = struct.pack(f"<{len(value)}f", *value)
        except (struct.error, OverflowError):
            raise ValueError("expected numbers that fit single precision") from None
        self.unpack(packed)
        return packed

    def unpack(self, wire: object) -> tuple[float, ...]:
        if type(wire) is not bytes:
            raise ValueError(f"expected packed numbers, got {_kind_name(wire)}")
        if len(wire) % 4 or len(wire) > 4 * MAX_TOKENS_PER_MESSAGE:
            raise ValueError(f"{len(wire)} bytes are no list of 4-byte numbers")
        values = struct.unpack(f"<{len(wire) // 4}f", wire)
        if not all(map(math.isfinite, values)):
            raise ValueError("expected finite numbers")
        return values


class ShortText:
    """A text of at most MAX_TEXT_BYTES bytes in UTF-8."""

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> str:
        if type(wire) is not str:
            raise ValueError(f"expected text, got {_kind_name(wire)}")
        _check_text(wire)
        return wire


class BigText:
    """A text of at most MAX_LONG_TEXT_BYTES bytes in UTF-8."""

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> str:
        if type(wire) is not str:
            raise ValueError(f"expected text, got {_kind_name(wire)}")
        _check_text(wire, MAX_LONG_TEXT_BYTES)
        return wire


class PackedTokens:
    """A list of token ids, packed as little-endian u32 into a msgpack bin."""

    def pack(self, value: object) -> bytes:
        if type(value) is not tuple:
            raise ValueError(f"expected a tuple of token ids, got {_kind_name(value)}")
        if len(value) > MAX_TOKENS_PER_MESSAGE:
            raise ValueError(f"{len(value)} tokens are over the limit of {MAX_TOKENS_PER_MESSAGE}")
        try:
            return struct.pack(f"<{len(value)}I", *value)
        except struct.error:
            raise ValueError("token ids are integers that fit 32 bits unsigned") from None

    def unpack(self, wire: object) -> tuple[int, ...]:
        if type(wire) is not bytes:
            raise ValueError(f"expected packed tokens, got {_kind_name(wire)}")
        if len(wire) % 4:
            raise ValueError(f"{len(wire)} bytes are not a whole number of 4-byte tokens")
        if len(wire) > 4 * MAX_TOKENS_PER_MESSAGE:
            raise ValueError(f"{len(wire) // 4} tokens are over the limit of {MAX_TOKENS_PER_MESSAGE}")
        return struct.unpack(f"<{len(wire) // 4}I", wire)


class TokenLists:
    """A list of token lists: a msgpack array of bins."""

    def __init__(self) -> None:
        self._each = PackedTokens()

    def pack(self, value: object) -> list[bytes]:
        if type(value) is not tuple or len(value) > MAX_TOKEN_LISTS:
            raise ValueError(f"expected a tuple of at most {MAX_TOKEN_LISTS} token lists")
        return [self._each.pack(each) for each in value]

    def unpack(self, wire: object) -> tuple[tuple[int, ...], ...]:
        if type(wire) is not list:
            raise ValueError(f"expected a list of packed tokens, got {_kind_name(wire)}")
        if len(wire) > MAX_TOKEN_LISTS:
            raise ValueError(f"{len(wire)} token lists are over the limit of {MAX_TOKEN_LISTS}")
        return tuple(map(self._each.unpack, wire))


class OptionMap:
    """A map from text to text, integer, float or bool. It is not nested."""

    def pack(self, value: object) -> object:
        return self.unpack(value)

    def unpack(self, wire: object) -> dict[str, str | int | float | bool]:
        if type(wire) is not dict:
            raise ValueError(f"expected a map, got {_kind_name(wire)}")
        if len(wire) > MAX_OPTIONS:
            raise ValueError(f"{len(wire)} options are over the limit of {MAX_OPTIONS}")
        for key, value in wire.items():
            if type(key) is not str or type(value) not in (str, int, float, bool):
                raise ValueError("options map text to text, integer, float or boolean")
            if type(value) is float and not math.isfinite(value):
                raise ValueError(f"option {value} is not a finite number")
            if type(value) is int and not -(1 << 63) <= value < 1 << 64:
                raise ValueError(f"option {value} does not fit 64 bits")
            _check_text(key)
            if type(value) is str:
                _check_text(value)
        return wire


class Record:
    """A map with the fields of the dataclass `kind`, each of which has a default.

    A field with its default may be absent. Unlike in a message, no other field may be there: its sender counts on its effect.
    """

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self._schema = dict(schema_of(kind))
        self._defaults = defaults_of(kind)

    def pack(self, value: object) -> dict[str, object]:
        if type(value) is not self.kind:
            raise ValueError(f"expected {self.kind.__name__}, got {_kind_name(value)}")
        values = {name: getattr(value, name) for name in self._schema}
        said = {name: each for name, each in values.items() if each != self._defaults[name]}
        return {name: self._field(name, self._schema[name].pack, each) for name, each in said.items()}

    def unpack(self, wire: object) -> Any:
        if type(wire) is not dict:
            raise ValueError(f"expected a map, got {_kind_name(wire)}")
        values = {}
        for name, each in wire.items():
            if name not in self._schema:
                raise ValueError(f"there is no field {str(name)[:100]!r}")
            values[name] = self._field(name, self._schema[name].unpack, each)
        return self.kind(**values)

    @staticmethod
    def _field(name: str, convert: Callable[[object], object], value: object) -> object:
        try:
            return convert(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def schema_of(record: type[Any]) -> tuple[tuple[str, Kind], ...]:
    """The name and the type of each field of a dataclass."""
    hints = get_type_hints(record, include_extras=True)
    return tuple((field.name, hints[field.name].__metadata__[0]) for field in fields(record))


def defaults_of(record: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that may be absent, and what they are then."""
    return {field.name: field.default for field in fields(record) if field.default is not MISSING}


def _check_text(text: str, most_bytes: int = MAX_TEXT_BYTES) -> None:
    try:
        if len(text.encode()) > most_bytes:
            raise ValueError(f"text is over {most_bytes} bytes")
    except UnicodeEncodeError:
        raise ValueError("text is not valid Unicode") from None


def _kind_name(wire: object) -> str:
    return "nil" if wire is None else type(wire).__name__


U32: TypeAlias = Annotated[int, Unsigned(32)]
U64: TypeAlias = Annotated[int, Unsigned(64)]
Bool: TypeAlias = Annotated[bool, Boolean()]
F64: TypeAlias = Annotated[float, Double()]
Floats: TypeAlias = Annotated[tuple[float, ...], PackedFloats()]
Text: TypeAlias = Annotated[str, ShortText()]
LongText: TypeAlias = Annotated[str, BigText()]
Tokens: TypeAlias = Annotated[tuple[int, ...], PackedTokens()]
TokenSequences: TypeAlias = Annotated[tuple[tuple[int, ...], ...], TokenLists()]
OptionValue: TypeAlias = str | int | float | bool
Options: TypeAlias = Annotated[dict[str, OptionValue], OptionMap()]
