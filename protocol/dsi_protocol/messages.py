"""The messages of the protocol. SPEC.md section 4 has a table for each. The annotations are the field types of fields.py.

W→O is a message from a worker to the orchestrator, O→W the other way. A position is an index into the text of a generation,
the prompt first. Ranges are half-open. A *request* is a Draft, a Verify or a Score. It is named by (generation, attempt) and
gets exactly one terminal reply: Verified, a Drafted or Scored with `done`, Cancelled, NeedPrefix or Failed. The `end` of a
request is base + len(tokens). A Verified with `more` is not terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from dsi_protocol.fields import U32, U64, Bool, Floats, Options, Record, Text, Tokens
from dsi_protocol.sampling import GREEDY, SamplingParameters

PROTOCOL_VERSION = 1
#: The most tokens of a Scored, and of a Verified of a generation with `top_logprobs`, so that it fits its frame.
MAX_TOLD = 512

Sampling: TypeAlias = Annotated[SamplingParameters, Record(SamplingParameters)]


@dataclass(frozen=True, slots=True)
class Hello:
    """W→O. The first message of a worker, repeated until Welcome or Goodbye comes.

    With `auto` and an empty model the orchestrator decides.
    """

    TYPE: ClassVar[int] = 1
    version: U32
    incarnation: U64  # a new random number for each start of the process, and for each time that it joins again
    role: Text  # auto | target | drafter
    engine: Text  # the name of the worker's engine, or auto
    model: Text  # a model reference, or ""
    device: Text  # such as cuda:0 or cpu:0
    host: Text  # the name of the machine
    process: U32  # the process id


@dataclass(frozen=True, slots=True)
class Welcome:
    """O→W. Tells a worker what to be. The worker loads the model, warms up and answers Ready.

    A worker that cannot be that, for example since it does not have the engine, answers Failed with generation 0 and the
    code `load`, and ends.
    """

    TYPE: ClassVar[int] = 2
    version: U32
    role: Text  # target | drafter
    engine: Text  # the engine of Hello, unless that was auto
    model: Text
    options: Options  # settings of the engine
    heartbeat_ms: U32  # how often the worker sends Heartbeat
    silence_ms: U32  # after so long without a connection the worker gives up its work for this orchestrator


@dataclass(frozen=True, slots=True)
class Ready:
    """W→O. The model is loaded and warmed up. A time of 0 means that it was not measured."""

    TYPE: ClassVar[int] = 3
    vocabulary: Text  # vocabulary_hash of the tokenizer; "" for a drafter that works with any vocabulary
    vocabulary_size: U32  # token ids are smaller; 0 if and only if `vocabulary` is empty
    max_length: U32  # how many positions a generation may have on this worker
    window: U32  # how many positions one verification forward holds; 0 for a drafter that does not say
    latency_us: U32  # of a verification of one position; of a drafter: of one guess
    window_latency_us: U32  # of a verification of a full window; 0 for a drafter
    slots: U32  # how many generations the worker serves side by side, at least 1
    batch_latency_us: U32  # of one forward for all slots, a full window each (a drafter: one guess each)
    load_ms: U32  # how long loading and warm-up took; 0 also means that there was nothing to load. For logs only
    fingerprint: U32  # equal numbers mean equal bits of a target server's logits; 0: the worker does not say
    rows: U32 = 1  # positions of a tree that a target server verifies, rows of a drafter's step; 1: chains only
    devices: U32 = 1  # how many devices compute a forward together: target servers of another number have other bits


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """W→O, on any connection: the worker lives. The orchestrator answers with the same message on the same connection."""

    TYPE: ClassVar[int] = 4
    incarnation: U64
    sequence: U64  # rises


@dataclass(frozen=True, slots=True)
class OpenGeneration:
    """O→W. Comes before the first request of a generation. Opening an open generation changes nothing."""

    TYPE: ClassVar[int] = 5
    generation: U64
    prompt_length: U32  # the prompt is at [0, prompt_length); a worker may read it in larger pieces
    correlation: Text  # a name for this generation in log lines
    sampling: Sampling = GREEDY  # how tokens are chosen


@dataclass(frozen=True, slots=True)
class CloseGeneration:
    """O→W. The worker may forget the generation. Requests in hand are cancelled; each still gets its terminal reply."""

    TYPE: ClassVar[int] = 6
    generation: U64


@dataclass(frozen=True, slots=True)
class Draft:
    """O→W, a request to a drafter: guess the tokens at [start, start + count).

    The worker must hold `base` tokens with the checksum `base_crc`, else it answers NeedPrefix. It writes `tokens` at
    [base, end). If `start` lies beyond `end`, the tokens between are the worker's own earlier guesses, which the request
    continues. If the worker does not hold that many tokens, its guesses begin where its tokens end.
    """

    TYPE: ClassVar[int] = 7
    generation: U64
    attempt: U64
    base: U32
    base_crc: U32
    tokens: Tokens
    start: U32  # at least 1, and at least `end`
    count: U32  # at least 1
    block: U32  # send a Drafted as soon as this many guesses of the main path are there; at least 1
    rows: U32 = 1  # the most rows that a step may have: one for the main path, the others for branches; at least 1
    committed: U32 = 0  # tokens before this position are committed: branches that left the main path before it are dead


@dataclass(frozen=True, slots=True)
class Drafted:
    """W→O. A block of guesses. The last block of a request has `done` and is terminal.

    The blocks of a request follow one another without a gap. The orchestrator recognises a lost block by `start`. In a chain
    (`parents` empty) the guesses stand at [start, start + len(tokens)). In a tree they are numbered in the order in which they
    are made: the token before the `start` of a Draft that brings its own prefix has its position as its number, tokens[0] has
    the number `start`, and parents[i] is the number of the token before tokens[i].
    """

    TYPE: ClassVar[int] = 8
    generation: U64
    attempt: U64
    start: U32
    tokens: Tokens
    done: Bool
    busy_us: U32  # time of computation since the last reply to this request
    parents: Tokens = ()  # empty: each guess follows the one before


@dataclass(frozen=True, slots=True)
class Verify:
    """O→W, a request to a target server: give the target's own tokens from `start` on, and check the tokens at [start, end).

    The prefix is as in Draft. `start` may be smaller than `base`, but not larger than `end`. With `parents` the tokens are a
    tree: tokens[i] follows tokens[parents[i] - 1], or the token at base - 1 where parents[i] is 0. The main path comes first: a
    token for each position from `base` on.

    With `ahead` the server may go on by itself: after an answer that ends with a token that no guess had, it starts the forward
    for the token after that, and answers again.
    """

    TYPE: ClassVar[int] = 9
    generation: U64
    attempt: U64
    base: U32
    base_crc: U32
    tokens: Tokens
    start: U32
    parents: Tokens = ()
    ahead: U32 = 0  # so many further answers, of one token each, the server may give by itself


@dataclass(frozen=True, slots=True)
class Verified:
    """W→O, terminal unless it has `more`. The target's own tokens from `start` on, between 1 and end - start + 1 of them.

    They go up to and including the first one that differs from the token of the request at its position, or, if none
    differs, up to and including the token at `end`. Every token follows from the first `start` tokens alone. An answer that was
    given by itself (`ahead` of Verify) is one token, at the position after the answer before. With `top_logprobs` an answer of
    more than MAX_TOLD tokens is cut to so many.
    """

    TYPE: ClassVar[int] = 10
    generation: U64
    attempt: U64
    start: U32
    tokens: Tokens
    logprobs: Floats  # for each token ln of its probability in the model's own softmax, if asked for; else empty
    forwards: U32  # how many forwards the request took since the last reply to it
    busy_us: U32  # time of computation since the last reply to this request
    more: Bool = False  # the server goes on by itself: another answer to this request follows
    top_tokens: Tokens = ()  # for each token the `top_logprobs` most probable ones, the most probable first
    top_logprobs: Floats = ()  # ln of the probability of each of `top_tokens`
    cached: U32 = 0  # positions of the prompt that were in the KV cache before the first request of the generation


@dataclass(frozen=True, slots=True)
class Cancel:
    """O→W. This attempt and all earlier ones of the generation are not wanted any more.

    A cancel has no answer of its own, may come twice, and may come before a request that it covers. Each cancelled request
    still gets its terminal reply.
    """

    TYPE: ClassVar[int] = 11
    generation: U64
    attempt: U64


@dataclass(frozen=True, slots=True)
class Cancelled:
    """W→O, terminal. The request was cancelled before it was complete."""

    TYPE: ClassVar[int] = 12
    generation: U64
    attempt: U64
    forwards: U32  # how many forwards the request took, but for those that an earlier Verified counted
    busy_us: U32  # time of computation since the last reply to this request


@dataclass(frozen=True, slots=True)
class NeedPrefix:
    """W→O, terminal. The worker does not hold the prefix of the request: send the tokens again from position `held` on."""

    TYPE: ClassVar[int] = 13
    generation: U64
    attempt: U64
    held: U32  # how many tokens the worker holds if that is less than `base`; 0 if the checksum differs


@dataclass(frozen=True, slots=True)
class Failed:
    """W→O, terminal. The request cannot be served. With generation 0: the worker itself cannot be what Welcome asks for."""

    TYPE: ClassVar[int] = 14
    generation: U64
    attempt: U64
    code: Text  # limit | request | unknown_generation | draining | engine; load with generation 0
    message: Text  # what is wrong, for people


@dataclass(frozen=True, slots=True)
class Goodbye:
    """W→O: this worker leaves. O→W: this incarnation does not serve any more. `reason` is for people."""

    TYPE: ClassVar[int] = 16
    reason: Text
    again: Bool = False  # O→W: the worker may say Hello again as another incarnation; if false, it must end


@dataclass(frozen=True, slots=True)
class Preparing:
    """W→O. The worker fetches or converts its model, and has not begun to load it. This time does not count as loading."""

    TYPE: ClassVar[int] = 17
    what: Text  # what it does, for people
    done_permille: U32  # how much is done, from 0 (or not known) to 1000


@dataclass(frozen=True, slots=True)
class Score:
    """O→W, a request to a target server: tell how probable the tokens at [start, end) are, each after the tokens before it.

    The prefix is as in Draft. `start` lies in [1, end). The generation was opened with `logprobs`.
    """

    TYPE: ClassVar[int] = 18
    generation: U64
    attempt: U64
    base: U32
    base_crc: U32
    tokens: Tokens
    start: U32


@dataclass(frozen=True, slots=True)
class Scored:
    """W→O. A block of log probabilities: of the tokens at [start, start + len(logprobs)). The last block has `done` and is
    terminal.

    The blocks of a request follow one another without a gap, from its `start` to its `end`. None has more than MAX_TOLD.
    """

    TYPE: ClassVar[int] = 19
    generation: U64
    attempt: U64
    start: U32
    logprobs: Floats  # ln of the probability of each token in the model's own softmax
    done: Bool
    forwards: U32  # how many forwards the request took since the last reply to it
    busy_us: U32  # time of computation since the last reply to this request
    top_tokens: Tokens = ()  # as in Verified
    top_logprobs: Floats = ()


FromWorker: TypeAlias = (
    Hello | Ready | Heartbeat | Drafted | Verified | Scored | Cancelled | NeedPrefix | Failed | Goodbye | Preparing
)
Request: TypeAlias = Draft | Verify | Score
FromOrchestrator: TypeAlias = Welcome | Heartbeat | OpenGeneration | CloseGeneration | Request | Cancel | Goodbye
Message: TypeAlias = FromWorker | FromOrchestrator
Reply: TypeAlias = Drafted | Verified | Scored | Cancelled | NeedPrefix | Failed

MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Ready, Heartbeat, OpenGeneration, CloseGeneration, Draft, Drafted,
    Verify, Verified, Cancel, Cancelled, NeedPrefix, Failed, Goodbye, Preparing, Score, Scored,
)  # fmt: skip
