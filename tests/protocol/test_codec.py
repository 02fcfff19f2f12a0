"""The codec against anything: every message survives the wire, nothing but ProtocolError comes out of bad bytes."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi_protocol import (
    MAX_FRAME_BYTES,
    MAX_TOKENS_PER_MESSAGE,
    MESSAGES,
    Cancel,
    FrameTooLarge,
    InvalidField,
    Message,
    ProtocolError,
    Verified,
    Verify,
    decode,
    encode,
)
from dsi_protocol.fields import (
    BigText,
    Boolean,
    Double,
    OptionMap,
    PackedFloats,
    PackedTokens,
    Record,
    ShortText,
    TokenLists,
    Unsigned,
)

U32 = st.integers(0, 2**32 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.one_of(st.text(max_size=20), st.integers(-(2**63), 2**64 - 1), st.booleans(), finite)


def values_of(kind: object) -> st.SearchStrategy[object]:
    match kind:
        case Unsigned(bits=bits):
            return st.integers(0, 2**bits - 1)
        case Boolean():
            return st.booleans()
        case Double():
            return st.floats(-(2.0**53), 2.0**53)
        case PackedFloats():
            return st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30).map(tuple)
        case ShortText() | BigText():
            return st.text(max_size=40)
        case PackedTokens():
            return st.lists(U32, max_size=30).map(tuple)
        case TokenLists():
            return st.lists(st.lists(U32, max_size=5).map(tuple), max_size=5).map(tuple)
        case OptionMap():
            return st.dictionaries(st.text(max_size=10), scalars, max_size=6)
        case Record(kind=kind):
            return instances_of(kind)
    raise AssertionError(kind)


def instances_of(message: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(message, include_extras=True)
    return st.builds(message, **{field.name: values_of(hints[field.name].__metadata__[0]) for field in fields(message)})


messages: st.SearchStrategy[Message] = st.one_of([instances_of(message) for message in MESSAGES])
wire_objects = st.recursive(
    st.none() | scalars | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500)
@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=1500)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(frame: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(frame)


@settings(max_examples=500)
@given(messages, st.data())
def test_damaged_frames_decode_or_are_refused(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@settings(max_examples=500)
@given(messages, st.data())
def test_fields_of_another_kind_decode_or_are_refused(message: Message, data: st.DataObject) -> None:
    wire = msgpack.unpackb(encode(message))
    wire[data.draw(st.sampled_from(sorted(wire)))] = data.draw(wire_objects)
    with contextlib.suppress(ProtocolError):
        decode(msgpack.packb(wire))


@given(messages, st.dictionaries(st.text(min_size=20, max_size=25), wire_objects, max_size=3))
def test_unknown_fields_are_ignored(message: Message, extra: dict[str, object]) -> None:
    assert decode(msgpack.packb({**msgpack.unpackb(encode(message)), **extra})) == message


def test_size_limits() -> None:
    most = Verified(1, 1, 1, (7,) * MAX_TOKENS_PER_MESSAGE, (), 1, 1)
    assert decode(encode(most)) == most
    with pytest.raises(InvalidField, match=r"Verified\.tokens: 262145 tokens are over the limit"):
        encode(Verified(1, 1, 1, (7,) * (MAX_TOKENS_PER_MESSAGE + 1), (), 1, 1))
    with pytest.raises(FrameTooLarge, match="over the limit"):
        decode(bytes(MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (Cancel(-1, 0), "Cancel.generation: -1 does not fit 64 bits"),
        (Cancel(1, 2**64), "Cancel.attempt: 18446744073709551616 does not fit 64 bits"),
        (Verify(1, 1, 0, 0, (2**32,), 1), "Verify.tokens: token ids are integers that fit 32 bits"),
    ],
)
def test_what_does_not_fit_is_not_sent(message: Message, problem: str) -> None:
    with pytest.raises(InvalidField, match=problem):
        encode(message)
