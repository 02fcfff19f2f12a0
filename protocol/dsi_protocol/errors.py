"""The exceptions for frames that the protocol does not allow."""

from __future__ import annotations


class ProtocolError(Exception):
    """Base class: the peer sent something that the protocol does not allow. Any other exception of the codec is a bug."""


class FrameTooLarge(ProtocolError):
    """The frame is larger than the limit. It was not decoded."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"frame of {size_bytes} bytes is over the limit of {limit_bytes} bytes")
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class MalformedFrame(ProtocolError):
    """The frame is not one msgpack map within the limits of SPEC.md section 3."""


class UnknownMessage(ProtocolError):
    """The frame names a message type that this version of the protocol does not have."""

    def __init__(self, message_type: int) -> None:
        super().__init__(f"unknown message type {message_type}")
        self.message_type = message_type


class InvalidField(ProtocolError):
    """A field is missing, has another type than the specification says, or is out of range."""

    def __init__(self, message: str, field: str, problem: str) -> None:
        super().__init__(f"{message}.{field}: {problem}")
        self.message = message
        self.field = field
        self.problem = problem
