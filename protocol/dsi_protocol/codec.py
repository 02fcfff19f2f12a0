"""Encodes messages as frames and decodes frames. For any bytes, `decode` returns one of MESSAGES or raises a ProtocolError."""

from __future__ import annotations

from typing import Any

import msgpack

from dsi_protocol.errors import FrameTooLarge, InvalidField, MalformedFrame, UnknownMessage
from dsi_protocol.fields import MAX_TOKENS_PER_MESSAGE, defaults_of, schema_of
from dsi_protocol.messages import MESSAGES, Message

#: The largest frame that a worker accepts: a full list of tokens, and room for the other fields.
MAX_FRAME_BYTES = 4 * MAX_TOKENS_PER_MESSAGE + 64 * 1024
#: The largest frame that an orchestrator accepts. Replies are short.
MAX_REPLY_FRAME_BYTES = 128 * 1024
#: Arrays, and maps beside `options` and `sampling`, occur only in fields that a later version may add.
MAX_ARRAY_ITEMS = 1024
MAX_NESTING = 8

_TYPE_KEY = "type"
#: The first size of msgpack's buffer. Its default of 256 KiB is more than all messages in flight need.
_BUFFER_BYTES = 1024


_SCHEMAS = {message: schema_of(message) for message in MESSAGES}
_PACKERS = {message: tuple((name, kind.pack) for name, kind in schema) for message, schema in _SCHEMAS.items()}
_UNPACKERS = {message: tuple((name, kind.unpack) for name, kind in schema) for message, schema in _SCHEMAS.items()}
#: Fields that may be absent, and what they are then. They are sent only where they say something else.
_DEFAULTS = {message: defaults_of(message) for message in MESSAGES}
_BY_TYPE: dict[int, type[Message]] = {message.TYPE: message for message in MESSAGES}
assert len(_BY_TYPE) == len(MESSAGES)


def encode(message: Message) -> bytes:
    """Returns the frame of `message`. Raises InvalidField if a value does not fit the type of its field."""
    wire: dict[str, object] = {_TYPE_KEY: message.TYPE}
    name = ""
    defaults = _DEFAULTS[type(message)]
    try:
        for name, pack in _PACKERS[type(message)]:
            value = getattr(message, name)
            if name not in defaults or value != defaults[name]:
                wire[name] = pack(value)
    except ValueError as error:
        raise InvalidField(type(message).__name__, name, str(error)) from None
    frame: bytes = msgpack.packb(wire, use_bin_type=True, buf_size=_BUFFER_BYTES)
    return frame


def decode(frame: bytes) -> Message:
    """Returns the message in `frame`. Raises FrameTooLarge, MalformedFrame, UnknownMessage or InvalidField.

    Fields that this version does not know are ignored, so that a newer peer may add some.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameTooLarge(len(frame), MAX_FRAME_BYTES)
    wire = _unpack(frame)
    if type(wire) is not dict:
        raise MalformedFrame(f"a frame is one map, not {type(wire).__name__}")
    for key in wire:
        if type(key) is not str:
            raise MalformedFrame("the keys of a frame are text")
    message_type = wire.get(_TYPE_KEY)
    if type(message_type) is not int:
        raise MalformedFrame("the frame has no integer field `type`")
    message = _BY_TYPE.get(message_type)
    if message is None:
        raise UnknownMessage(message_type)
    values: list[Any] = []
    name, defaults, absent = "", _DEFAULTS[message], 0
    try:
        for name, unpack in _UNPACKERS[message]:
            if name in wire or name not in defaults:
                values.append(unpack(wire[name]))
            else:
                values.append(defaults[name])
                absent += 1
    except KeyError:
        raise InvalidField(message.__name__, name, "missing") from None
    except ValueError as error:
        raise InvalidField(message.__name__, name, str(error)) from None
    if len(wire) > len(values) - absent + 1:
        _refuse_deep(wire)
    return message(*values)


def _unpack(frame: bytes) -> object:
    try:
        return msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_FRAME_BYTES,
            max_bin_len=MAX_FRAME_BYTES,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=MAX_ARRAY_ITEMS,
            ext_hook=_refuse_extension,
        )
    except Exception as error:  # msgpack raises many types, ValueError and RecursionError among them
        raise MalformedFrame(f"not msgpack within the limits: {type(error).__name__}: {str(error)[:200]}") from None


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


def _refuse_deep(value: object, depth: int = 0) -> None:
    if depth > MAX_NESTING:
        raise MalformedFrame(f"nested deeper than {MAX_NESTING}")
    if isinstance(value, dict):
        for inner in value.values():
            _refuse_deep(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _refuse_deep(inner, depth + 1)
