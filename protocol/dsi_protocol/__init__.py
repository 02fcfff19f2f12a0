"""The DSI wire protocol in Python: messages, codec, errors and endpoints. SPEC.md beside this package is the standard.

The package depends on msgpack only.
"""

from dsi_protocol.checksums import prefix_checksum, vocabulary_hash
from dsi_protocol.codec import MAX_FRAME_BYTES, MAX_REPLY_FRAME_BYTES, decode, encode
from dsi_protocol.endpoints import MAX_PATH_BYTES, MAX_PORT, Endpoint, EndpointError
from dsi_protocol.errors import FrameTooLarge, InvalidField, MalformedFrame, ProtocolError, UnknownMessage
from dsi_protocol.fields import MAX_TEXT_BYTES, MAX_TOKENS_PER_MESSAGE, OptionValue
from dsi_protocol.messages import (
    MAX_TOLD,
    MESSAGES,
    PROTOCOL_VERSION,
    Cancel,
    Cancelled,
    CloseGeneration,
    Draft,
    Drafted,
    Failed,
    FromOrchestrator,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    NeedPrefix,
    OpenGeneration,
    Preparing,
    Ready,
    Reply,
    Verified,
    Verify,
    Welcome,
)
from dsi_protocol.sampling import MAX_TOP_LOGPROBS, SamplingParameters

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_PATH_BYTES",
    "MAX_PORT",
    "MAX_REPLY_FRAME_BYTES",
    "MAX_TEXT_BYTES",
    "MAX_TOKENS_PER_MESSAGE",
    "MAX_TOLD",
    "MAX_TOP_LOGPROBS",
    "MESSAGES",
    "PROTOCOL_VERSION",
    "Cancel",
    "Cancelled",
    "CloseGeneration",
    "Draft",
    "Drafted",
    "Endpoint",
    "EndpointError",
    "Failed",
    "FrameTooLarge",
    "FromOrchestrator",
    "FromWorker",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "InvalidField",
    "MalformedFrame",
    "Message",
    "NeedPrefix",
    "OpenGeneration",
    "OptionValue",
    "Preparing",
    "ProtocolError",
    "Ready",
    "Reply",
    "SamplingParameters",
    "UnknownMessage",
    "Verified",
    "Verify",
    "Welcome",
    "decode",
    "encode",
    "prefix_checksum",
    "vocabulary_hash",
]
