"""Requests that nobody wrote: `make fuzz`, or `python -m fuzzing.http --requests 2000`.

Hypothesis draws batches of requests, valid and broken ones, for a service on a loopback socket with timed workers in processes
of their own. All requests of a batch run at the same time; some clients leave at a random moment. What must hold:

* no answer has a status of 500 or above but 503, and every error has OpenAI's shape;
* every text that came to its end is the one of plain decoding, streamed or not;
* soon after a batch nothing runs or waits, and no worker was ever lost.

A failure is shrunk to the smallest batch that shows it, and printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from support.patience import limit_s, patience
from support.service import MODEL, Client, Reply, Served, lone_text, post, served

#: Generations that may wait or run: some batches want more.
PLACES = 12
#: A broken request may turn out to be a valid one that asks for much. Its client leaves after this.
_LONGEST_S = 0.5
_BATCHES_AT_ONCE = 50

Leaving = Literal["stays", "sending", "sent", "head", "events", "later", "half-closed"]
_LEAVINGS: tuple[Leaving, ...] = (
    "stays",
    "stays",
    "stays",
    "sending",
    "sent",
    "head",
    "events",
    "later",
    "half-closed",
)


@dataclass(frozen=True)
class Plan:
    """What one client sends, and when it leaves."""

    path: str
    body: bytes
    #: The fields of a request that must be answered; None if it is broken, or may be.
    valid: dict[str, Any] | None
    headers: dict[str, str] = field(default_factory=dict)
    leaving: Leaving = "stays"
    #: How much of the request is sent before it leaves, or how long it stays.
    moment: float = 0.0
    #: The body comes in chunks of this size. 0: all at once, with its length.
    chunk: int = 0
    #: The same request once more on the same connection, sent at the same time.
    twice: bool = False

    def request(self) -> bytes:
        if not self.chunk:
            return post(self.path, self.body, **self.headers)
        head = post(self.path, b"", **{**self.headers, "Content_Length": "", "Transfer_Encoding": "chunked"})
        pieces = [self.body[at : at + self.chunk] for at in range(0, len(self.body), self.chunk)]
        return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# What is drawn

_word = st.one_of(
    st.integers(0, 999).map(lambda number: ("w{}", "é{}", "日本{}", "🙂{}")[number % 4].format(number)),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
_text = st.one_of(
    st.lists(_word, max_size=30).map(" ".join),
    st.builds(lambda word, times: f"{word} " * times, _word, st.sampled_from((1, 300, 3000))),
)
_ids = st.lists(st.integers(0, 999), min_size=1, max_size=60)
_any_json = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**300), st.floats(), st.text(max_size=8),
        st.sampled_from(("\ud800", "a\udfff", "\0", "auto", "dsi")),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(st.characters(), max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip
_stop = st.one_of(st.sampled_from((" ", "1", "日本", "é", "🙂", " w", "9 ")), st.text("w5é日 ", min_size=1, max_size=3))
_part = st.fixed_dictionaries({"type": st.just("text"), "text": _text}, optional={"cache_control": st.none()})
_message: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("system", "developer", "user", "assistant")),
        "content": st.one_of(_text, st.lists(_part, max_size=3)),
    },
    optional={"name": st.none(), "refusal": st.none(), "tool_calls": st.one_of(st.none(), st.just([]))},
)


def _or_null(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, st.none())


_dsi = st.fixed_dictionaries(
    {},
    optional={
        "algorithm": _or_null(st.sampled_from(("dsi", "si", "ar"))), "sp": _or_null(st.integers(1, 4)),
        "lookahead": _or_null(st.one_of(st.just("auto"), st.integers(1, 8))),
    },
)  # fmt: skip
_options = {
    "stream": _or_null(st.booleans()), "n": _or_null(st.integers(1, 4)), "seed": _or_null(st.integers(-(1 << 63), (1 << 64) - 1)),
    "stop": _or_null(st.one_of(_stop, st.lists(_stop, max_size=4))), "temperature": _or_null(st.floats(0, 2)),
    "top_p": _or_null(st.floats(0.1, 1)), "top_k": _or_null(st.integers(1, 1 << 31)), "min_p": _or_null(st.floats(0, 1)),
    "ignore_eos": _or_null(st.booleans()),
    "stream_options": _or_null(st.fixed_dictionaries({"include_usage": _or_null(st.booleans())})),
    "dsi": _or_null(_dsi), "user": _or_null(st.text(max_size=5)), "presence_penalty": _or_null(st.floats(-2, 2)),
    "logit_bias": _or_null(st.dictionaries(st.integers(0, 999).map(str), st.integers(-100, 100), max_size=3)),
    "tools": st.none(), "response_format": _or_null(st.just({"type": "text"})),
    "max_tokens": _or_null(st.integers(1, 40)),
}  # fmt: skip
_chat = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": st.lists(_message, min_size=1, max_size=4)},
    optional={**_options, "logprobs": _or_null(st.booleans()), "max_completion_tokens": _or_null(st.integers(1, 40))},
)
_plain = st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "prompt": st.one_of(_text, _ids, _text.map(lambda text: [text]), _ids.map(lambda ids: [ids])),
    },
    optional={**_options, "logprobs": _or_null(st.integers(0, 5)), "echo": _or_null(st.just(False))},
)
_block = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _text}),
    st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": st.just("1"), "content": _text}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": st.just("1"), "name": st.just("f"), "input": st.just({})}
    ),
)
_turn = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("user", "assistant", "system")),
        "content": st.one_of(_text, st.lists(_block, max_size=3)),
    }
)
_messages = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": st.lists(_turn, min_size=1, max_size=4), "max_tokens": st.integers(1, 40)},
    optional={"stream": st.booleans(), "system": _text, "stop_sequences": st.lists(_stop, max_size=3), "dsi": _dsi},
)
_responses = st.fixed_dictionaries(
    {"model": st.just(MODEL), "input": st.one_of(_text, st.lists(_message, min_size=1, max_size=3))},
    optional={"stream": st.booleans(), "instructions": _text, "max_output_tokens": st.integers(1, 40)},
)
_older = st.one_of(
    _chat.map(lambda fields: ("/v1/chat/completions", fields)), _plain.map(lambda fields: ("/v1/completions", fields))
)
_newer = st.one_of(
    _messages.map(lambda fields: ("/v1/messages", fields)), _responses.map(lambda fields: ("/v1/responses", fields))
)
_requests = st.one_of(_older, _older, _newer)
#: Their answers are compared with what plain decoding gives.
_COMPARED = ("/v1/chat/completions", "/v1/completions")


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[str, bytes, dict[str, Any] | None]:
    path, fields = draw(_requests)
    body = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    match draw(st.sampled_from(("valid", "valid", "valid", "valid", "field", "bytes", "text", "anything"))):
        case "valid":
            return path, body, fields if path in _COMPARED else None
        case "field":  # something else in one place, or one more key
            name = draw(st.one_of(st.sampled_from([*_options, "messages", "prompt", "model"]), st.text(max_size=5)))
            value = draw(st.one_of(_any_json, st.sampled_from((13, 16, 10**400, -1, 1e308, "", [], {}))))
            return path, json.dumps({**fields, name: value}).encode("utf-8", "surrogatepass"), None
        case "bytes":
            broken = bytearray(body)
            for _ in range(draw(st.integers(1, 4))):
                at = draw(st.integers(0, max(0, len(broken) - 1)))
                broken[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
            return path, bytes(broken), None
        case "text":
            inside = draw(st.sampled_from((
                '"seed": 1e999', '"n": NaN', '"n": 1, "n": 1', '"stop": "\\ud800"', '"\\udc00": 1', '"x": ' + "[" * 5000,
                '"x": ' + '{"a":' * 70 + "1" + "}" * 70, '"seed": ' + "9" * 5000, '"x": "' + "y" * 200_000 + '"',
                '"x": [' + "0," * 5000 + "0]",
            )))  # fmt: skip
            return path, body[:-1] + b", " + inside.encode() + b"}", None
    anything = draw(st.one_of(_any_json.map(lambda value: json.dumps(value).encode()), st.binary(max_size=50)))
    return path, anything, None


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    path, body, valid = draw(_bodies())
    headers = {}
    if valid is None and draw(st.integers(0, 3)) == 0:
        headers = draw(st.sampled_from((
            {"Content_Type": "text/plain"}, {"Content_Type": ""}, {"Content_Encoding": "gzip"}, {"Content_Length": "99999999999"},
            {"Content_Length": "-1"}, {"Expect": "100-continue"}, {"Connection": "close"}, {"Upgrade": "websocket"},
            {"X_" + "y" * 70_000: "z"},
        )))  # fmt: skip
        path = draw(st.sampled_from((path, "/v1/models", "/v1/nowhere", "/%ff", "/dashboard/events")))
    leaving: Leaving = draw(
        st.sampled_from(("stays", "stays", "stays", "sending", "sent", "head", "events", "later", "half-closed"))
    )
    chunk = draw(st.sampled_from((0, 0, 0, 1, 1000))) if "Content_Length" not in headers and len(body) < 5000 else 0
    moment, twice = draw(st.floats(0, 1)), draw(st.integers(0, 7)) == 0
    return Plan(path, body, valid, headers, leaving, moment, chunk, twice)


# What is done with it


class Fuzzer:
    """A service in a thread of its own, and what became of the requests."""

    def __init__(self, service: Served, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._workers = self._worker_numbers()
        self.outcomes: Counter[str] = Counter()
        self.texts = 0
        self.slowest_quiet_s = 0.0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    def run(self, batch: list[Plan]) -> None:
        """Raises AssertionError."""
        asyncio.run_coroutine_threadsafe(self._run(batch), self._loop).result(limit_s(600))

    async def _run(self, batch: list[Plan]) -> None:
        async with asyncio.TaskGroup() as clients:
            for plan in batch:
                clients.create_task(self._play(plan))
        begun_s = time.monotonic()
        await self._service.quiet()
        self.slowest_quiet_s = max(self.slowest_quiet_s, time.monotonic() - begun_s)
        assert self._worker_numbers() == self._workers, "a worker was lost"
        self._service.clients.clear()

    def _worker_numbers(self) -> list[int]:
        return sorted(worker.number for worker in self._service.orchestrator.workers)

    async def _play(self, plan: Plan) -> None:
        client = await self._service.connect()
        try:
            async with patience(30.0 if plan.valid is not None or plan.leaving == "stays" else _LONGEST_S):
                await self._talk(client, plan)
        except (TimeoutError, ConnectionError):
            assert plan.valid is None or plan.leaving != "stays", f"no answer to {plan}"
            self.outcomes["left"] += 1
        finally:
            client.leave()

    async def _talk(self, client: Client, plan: Plan) -> None:
        request = plan.request() * (1 + plan.twice)
        if plan.leaving == "sending":
            await client.send(request[: int(len(request) * plan.moment)])
            self.outcomes["left while it sent"] += 1
            return
        await client.send(request)
        match plan.leaving:
            case "sent":
                self.outcomes["left before an answer"] += 1
            case "later":
                await asyncio.sleep(0.1 * plan.moment)
                self.outcomes["left before an answer"] += 1
            case "half-closed":
                client.writer.write_eof()
                await client.closed()
                self.outcomes["closed its side"] += 1
            case "head":
                self._check_head(plan, await client.reply(until=lambda reply: bool(reply.status)))
            case "events":
                most = int(20 * plan.moment)
                self._check_head(plan, await client.reply(until=lambda reply: reply.body.count(b"data: ") > most))
            case "stays":
                for _ in range(1 + plan.twice):
                    await self._stay(client, plan)

    async def _stay(self, client: Client, plan: Plan) -> None:
        if plan.valid is not None:
            reply = await client.reply()
            assert reply.complete, f"half an answer to {plan}: {reply}"
            self._check_head(plan, reply)
            if reply.status == 200:
                self._check_text(plan.path, plan.valid, reply)
            return
        with suppress(TimeoutError):
            async with patience(_LONGEST_S):
                self._check_head(plan, await client.reply())
                return
        self.outcomes["left"] += 1

    def _check_head(self, plan: Plan, reply: Reply) -> None:
        self.outcomes[str(reply.status or "closed")] += 1
        assert reply.status < 500 or reply.status == 503, f"{reply} to {plan}"
        if reply.status >= 400 and reply.complete:
            code = reply.error.get("code")
            if plan.valid is not None:
                reason = f"{reply.error} to {plan}"
                if reply.status == 429:
                    assert code == "queue_full", reason
                else:
                    assert reply.status == 400, reason
                    assert reply.error["message"] == "the prompt is empty: give at least one token", reason

    def _check_text(self, path: str, asked: dict[str, Any], reply: Reply) -> None:
        given = {name: value for name, value in asked.items() if value is not None}
        tokenizer = self._service.tokenizer
        chat = path.endswith("chat/completions")
        if chat:
            ids = tokenizer.encode_chat([
                {"role": "system" if message["role"] == "developer" else message["role"], "content": _content(message)}
                for message in given["messages"]
            ])  # fmt: skip
            most = given.get(
                "max_completion_tokens", given.get("max_tokens", self._service.service.config.default_max_tokens)
            )
        else:
            prompt = given["prompt"]
            prompt = prompt[0] if isinstance(prompt, list) and isinstance(prompt[0], str | list) else prompt
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            most = given.get("max_tokens", 16)
        stop = given.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        expected = lone_text(tokenizer, ids, most, stops=stops, ignore_eos=given.get("ignore_eos", False), chat=chat)
        found = _streamed(reply, chat) if given.get("stream") else _whole(reply, chat)
        assert found == [expected] * given.get("n", 1), f"{found} instead of {expected} for {asked}"
        self.texts += len(found)


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _whole(reply: Reply, chat: bool) -> list[tuple[str, str]]:
    choices = sorted(reply.json["choices"], key=lambda choice: int(choice["index"]))
    return [(choice["message"]["content"] if chat else choice["text"], choice["finish_reason"]) for choice in choices]


def _streamed(reply: Reply, chat: bool) -> list[tuple[str, str]]:
    *events, done = reply.events
    assert done == "[DONE]"
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for event in events:
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in reasons, "nothing follows the end of a choice"
            texts[index] = texts.get(index, "") + (choice["delta"].get("content", "") if chat else choice["text"])
            if choice["finish_reason"] is not None:
                reasons[index] = choice["finish_reason"]
    return [(texts[index], reasons[index]) for index in sorted(texts)]


@contextmanager
def fuzzer() -> Iterator[Fuzzer]:
    """On two target servers of two milliseconds with four slots each, and a drafter."""
    ready, done = threading.Event(), threading.Event()
    found: list[Fuzzer] = []

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with served(
                Path(directory), sp=2, target_ms=2, drafter_ms=0.5, slots=4, max_generations=PLACES, restarts=0,
                config={"default_max_tokens": 64},
            ) as service:  # fmt: skip
                found.append(Fuzzer(service, asyncio.get_running_loop()))
                ready.set()
                await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(limit_s()), "the service did not start"
        yield found[0]
    finally:
        done.set()
        thread.join()


def run(requests: int, first_seed: int) -> Fuzzer:
    """So many requests or a few more. Raises AssertionError, and what Hypothesis raises for several."""
    with fuzzer() as here:
        number = first_seed
        while here.requests < requests:

            @seed(number)
            @settings(
                max_examples=_BATCHES_AT_ONCE, deadline=None, database=None, print_blob=False,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
            )  # fmt: skip
            @given(st.lists(plans(), min_size=1, max_size=6))
            def batches(batch: list[Plan]) -> None:
                if here.requests < requests:
                    here.run(batch)

            batches()
            number += 1
        return here


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    done = run(arguments.requests, arguments.seed)
    outcomes = ", ".join(f"{name}: {number}" for name, number in sorted(done.outcomes.items()))
    sys.stdout.write(
        f"{done.requests} requests ({outcomes}), {done.texts} texts right, no worker lost, nothing left after "
        f"{done.slowest_quiet_s * 1e3:.0f} ms at most, in {time.monotonic() - begun:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
