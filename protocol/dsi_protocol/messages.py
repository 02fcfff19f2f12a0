"""Every message of the protocol, in the order of SPEC.md. The field annotations are the wire kinds: see fields.py.

Directions: W→O from a worker to the orchestrator, O→W the other way. Positions are absolute indices into the
generation's token sequence (prompt first); ranges are half-open. A *request* is a Draft or a Verify; it is named by
(generation, attempt) and gets exactly one terminal reply: Verified, a Drafted with `done`, Cancelled, NeedPrefix or Failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from dsi_protocol.fields import F64, U32, U64, Bool, Floats, Options, Text, Tokens

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """W→O. The first message; repeated until Welcome or Goodbye comes. `auto` and "" leave the choice to the orchestrator."""

    TYPE: ClassVar[int] = 1
    version: U32
    incarnation: U64  # random for each process, and for each time that a worker joins: then it is another worker
    role: Text  # auto | target | drafter
    engine: Text  # auto, or the name of an engine
    model: Text  # a model reference, or ""
    device: Text  # such as cuda:0 or cpu:0
    host: Text
    process: U32


@dataclass(frozen=True, slots=True)
class Welcome:
    """O→W. What the worker is to be. It loads the model, warms up, and answers Ready or Failed."""

    TYPE: ClassVar[int] = 2
    version: U32
    role: Text  # target | drafter
    engine: Text
    model: Text
    options: Options  # settings of the engine
    heartbeat_ms: U32  # how often the worker sends Heartbeat
    silence_ms: U32  # after so long without a connection a worker gives up what it does for this orchestrator


@dataclass(frozen=True, slots=True)
class Ready:
    """W→O. The model is loaded and warm."""

    TYPE: ClassVar[int] = 3
    vocabulary: Text  # vocabulary_hash of the tokenizer; "" if the engine has no vocabulary of its own
    vocabulary_size: U32  # ids are below it; 0 as above
    max_length: U32  # positions a generation may have on this worker
    window: U32  # positions that one verification forward holds
    #: Measured when warm: a verification of one position, or one drafted token. 0 if it was not measured.
    latency_us: U32
    window_latency_us: U32  # a verification of a full window; a drafter says 0
    #: Generations that the worker serves side by side, in one forward where it can: no more are given to it. At least 1.
    slots: U32
    batch_latency_us: U32  # a forward for all slots, each with a full window (a drafter: one token); 0: not measured
    load_ms: U32
    fingerprint: U32  # of the bits of a target server's logits; 0: it does not say


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """W→O on any connection, answered O→W with the same fields on the same connection."""

    TYPE: ClassVar[int] = 4
    incarnation: U64
    sequence: U64


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """O→W. Before the first request of a generation. Opening an open generation changes nothing."""

    TYPE: ClassVar[int] = 5
    generation: U64
    prompt_length: U32  # positions [0, prompt_length) are the prompt: they may be read in larger chunks
    correlation: Text  # the request id for log lines
    temperature: F64  # below 1e-6 is greedy
    top_k: U32  # 0 is off
    top_p: F64
    min_p: F64
    repetition_penalty: F64
    seed: U64
    logprobs: Bool  # whether Verified shall carry them


@dataclass(frozen=True, slots=True)
class CloseGeneration:
    """O→W. Everything the worker holds for the generation may go; what is in flight is cancelled."""

    TYPE: ClassVar[int] = 6
    generation: U64


@dataclass(frozen=True, slots=True)
class Draft:
    """O→W, request. Draft the positions [start, start + count).

    The worker first makes its sequence agree: it must hold `base` tokens with checksum `base_crc` (else NeedPrefix),
    and `tokens` stand at [base, base + len(tokens)). Where start lies beyond that, the positions between are the
    worker's own earlier drafts: the request continues them.
    """

    TYPE: ClassVar[int] = 7
    generation: U64
    attempt: U64
    base: U32
    base_crc: U32
    tokens: Tokens
    start: U32
    count: U32
    block: U32  # send a Drafted at the latest each `block` tokens


@dataclass(frozen=True, slots=True)
class Drafted:
    """W→O. `tokens` were drafted at [start, start + len(tokens)). The last one of a request is `done`."""

    TYPE: ClassVar[int] = 8
    generation: U64
    attempt: U64
    start: U32
    tokens: Tokens
    done: Bool
    busy_us: U32  # compute time since the last reply to this request


@dataclass(frozen=True, slots=True)
class Verify:
    """O→W, request. Give the target's own tokens from position `start` on; prefix as in Draft.

    With n = base + len(tokens) the worker checks the tokens at [start, n): see Verified.
    """

    TYPE: ClassVar[int] = 9
    generation: U64
    attempt: U64
    base: U32
    base_crc: U32
    tokens: Tokens
    start: U32


@dataclass(frozen=True, slots=True)
class Verified:
    """W→O, terminal. The target's own tokens from `start` on: up to and including the first that differs from the
    request's, or, if none does, one beyond them. Every token in it follows from the prefix before `start` alone."""

    TYPE: ClassVar[int] = 10
    generation: U64
    attempt: U64
    start: U32
    tokens: Tokens
    logprobs: Floats  # of each token, if asked for, else empty: ln of the model's own softmax, before any parameter
    forwards: U32
    busy_us: U32


@dataclass(frozen=True, slots=True)
class Cancel:
    """O→W. Requests of this generation with this attempt or an earlier one are no longer wanted.

    One way, idempotent, monotone; it may overtake the request it names. Each request still gets its terminal reply."""

    TYPE: ClassVar[int] = 11
    generation: U64
    attempt: U64


@dataclass(frozen=True, slots=True)
class Cancelled:
    """W→O, terminal. The request was cancelled before it was complete."""

    TYPE: ClassVar[int] = 12
    generation: U64
    attempt: U64
    forwards: U32
    busy_us: U32


@dataclass(frozen=True, slots=True)
class NeedPrefix:
    """W→O, terminal. The worker does not hold the prefix the request assumes: send it again from position `held`."""

    TYPE: ClassVar[int] = 13
    generation: U64
    attempt: U64
    held: U32


@dataclass(frozen=True, slots=True)
class Failed:
    """W→O, terminal for (generation, attempt); with generation 0 it speaks of the worker (its model did not load)."""

    TYPE: ClassVar[int] = 14
    generation: U64
    attempt: U64
    code: Text  # load | engine | limit | unknown_generation
    message: Text


@dataclass(frozen=True, slots=True)
class Goodbye:
    """W→O: this worker leaves. O→W: this incarnation is not served any more. `reason` is for people."""

    TYPE: ClassVar[int] = 16
    reason: Text
    again: Bool = False  # O→W: the worker may say Hello again, as another incarnation; else it ends


@dataclass(frozen=True, slots=True)
class Preparing:
    """W→O. Between Welcome and loading: the worker fetches or converts its model. This time is not counted as loading."""

    TYPE: ClassVar[int] = 17
    what: Text  # for people
    done_permille: U32  # 0 if it is not known, up to 1000


FromWorker: TypeAlias = (
    Hello | Ready | Heartbeat | Drafted | Verified | Cancelled | NeedPrefix | Failed | Goodbye | Preparing
)
FromOrchestrator: TypeAlias = Welcome | Heartbeat | OpenGeneration | CloseGeneration | Draft | Verify | Cancel | Goodbye
Message: TypeAlias = FromWorker | FromOrchestrator
Reply: TypeAlias = Drafted | Verified | Cancelled | NeedPrefix | Failed

MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Ready, Heartbeat, OpenGeneration, CloseGeneration, Draft, Drafted,
    Verify, Verified, Cancel, Cancelled, NeedPrefix, Failed, Goodbye, Preparing,
)  # fmt: skip
