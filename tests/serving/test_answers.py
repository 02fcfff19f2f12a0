"""What a client is told of the text: the same, however it was decoded. The model's tokens are often no UTF-8."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import WordLevel

from dsi_actors import Orchestrator, Sampling
from dsi_actors.config import ALGORITHMS, Algorithm
from dsi_actors.serving.completions import Choice, Completion, Job
from dsi_actors.serving.metrics import Metrics
from dsi_actors.tokenizer import Tokenizer
from serving.test_openai import served
from support.engines import make_tiny_model
from support.timed import PROMPT, timed_config
from support.tokenizers import CONTROL, llama_2, save

DECODINGS = ({"algorithm": "ar"}, {"algorithm": "si", "lookahead": 4}, {"algorithm": "dsi", "lookahead": 3})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = llama_2()
    directory = make_tiny_model(tmp_path_factory.mktemp("llama"), words=library.get_vocab_size())
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    return save(library, directory, template=template)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with served(model) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, *, stream: bool = False, dsi: Any = None, **more: Any) -> dict[str, Any]:
    """Text, reason, usage and log probabilities of a completion."""
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "heat flows", "max_tokens": 60, "temperature": 1.0, "seed": 4, "logprobs": 0,
        "extra_body": {"ignore_eos": True, "dsi": dsi or {"algorithm": "ar"}}, **more,
    }  # fmt: skip
    if not stream:
        answer = client.completions.create(**asked)
        [choice] = answer.choices
        assert choice.logprobs is not None
        assert answer.usage is not None
        return {
            "text": choice.text, "reason": choice.finish_reason, "tokens": answer.usage.completion_tokens,
            "logprobs": choice.logprobs.model_dump(exclude={"top_logprobs"}),
        }  # fmt: skip
    text, reason, tokens = "", None, 0
    logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
            for name, values in logprobs.items():
                values.extend(getattr(choice.logprobs, name, None) or [])
    return {"text": text, "reason": reason, "tokens": tokens, "logprobs": logprobs}


async def test_what_is_counted_does_not_depend_on_how_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of committed tokens goes on behind a stop string: that is counted nowhere."""
    for name in (
        "_LATE_S",
        "_LATE_UNKNOWN_S",
    ):  # SI waits for its drafts, and so has blocks, however slow the machine is
        monkeypatch.setattr(f"dsi_actors.generation.draft_timeout.{name}", 600.0)
    words = {f"w{number}": number for number in range(1000)}
    tokenizer = Tokenizer(save(LibraryTokenizer(WordLevel(words, unk_token="w0")), tmp_path))
    behind = 0
    async with Orchestrator(timed_config(target_ms=8, acceptance=0.9)) as orchestrator:

        async def answer(stops: Sequence[str], algorithm: Algorithm, tokens: int = 40) -> tuple[Choice, float]:
            metrics = Metrics("timed", workers=lambda role: 1, waiting=lambda: 0)
            job = Job(
                [PROMPT], Sampling(max_tokens=tokens), stops, 1, algorithm, None, "auto" if algorithm == "ar" else 4, None,
                "test", continues=True,
            )  # fmt: skip
            completion = Completion(orchestrator, tokenizer, metrics, job)
            async for _ in completion.updates():
                pass
            said = metrics.text().decode().splitlines()
            return completion.choices[0], sum(
                float(line.split()[-1]) for line in said if line.startswith("dsi_tokens_total")
            )

        whole = (await answer((), "ar"))[0].text
        for place in (7, 17, 18, 19, 20, 29):
            stop = f"{whole.split()[place]} "
            assert whole.find(f" {stop}") == len(" ".join(["", *whole.split()[:place]])), "it was there before"
            for algorithm in ALGORITHMS:
                choice, counted = await answer([f" {stop}"], algorithm)
                # The space behind the word comes with the next token.
                assert choice.tokens == counted == sum(len(piece.tokens) for piece in choice.pieces) == place + 2
                assert (choice.text, choice.finish_reason) == (whole[: whole.find(f" {stop}")], "stop")
                assert choice.report is not None
                behind += choice.report.tokens - choice.tokens
            # Complete with the very last token that is allowed: it is a stop string all the same.
            assert (await answer([f" {stop}"], "dsi", place + 2))[0].finish_reason == "stop"
            assert (await answer([f" {stop}"], "dsi", place + 1))[0].finish_reason == "length"
    assert behind > 0, "no block went on behind a stop string"


def test_a_stop_string_may_be_a_special_token(client: openai.OpenAI) -> None:
    found = 0
    for seed in range(12):
        whole = ask(client, seed=seed)
        special = [place for place, token in enumerate(whole["logprobs"]["tokens"]) if token == ""]
        if not special:
            continue
        found += 1
        for decoding in DECODINGS:
            answer = ask(client, seed=seed, stop=list(CONTROL), dsi=decoding)
            assert answer["tokens"] == special[0] + 1
            assert answer["reason"] == "stop"
            assert answer["text"] == whole["text"][: whole["logprobs"]["text_offset"][special[0]]]
        break
    assert found, "no answer has a special token"


def test_each_token_has_its_bytes_and_its_place(client: openai.OpenAI) -> None:
    broken = 0
    for seed in range(6):
        whole = ask(client, seed=seed)
        places = whole["logprobs"]["text_offset"]
        assert places == sorted(places)
        assert places[-1] <= len(whole["text"])
        for token, place in zip(whole["logprobs"]["tokens"], places, strict=True):
            if token.startswith("bytes:"):
                broken += 1
                assert token.removeprefix("bytes:").startswith("\\x")
            elif "\ufffd" not in whole["text"]:
                assert whole["text"][place:].startswith(token)
    assert broken
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "these </s> laws"}], max_tokens=60, seed=3, temperature=1,
        logprobs=True, top_logprobs=20, extra_body={"ignore_eos": True},
    ).choices[0]  # fmt: skip
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    data = b"".join(bytes(token.bytes or []) for token in chat.logprobs.content)
    assert data.decode(errors="replace") == chat.message.content
    assert any(token.token.startswith("\\x") for token in chat.logprobs.content)
    chosen = 0
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 20
        chosen += any((other.bytes, other.logprob) == (token.bytes, token.logprob) for other in token.top_logprobs)
        for other in token.top_logprobs:
            text = bytes(other.bytes or []).decode(errors="replace")
            assert other.token.startswith("\\x") if "\ufffd" in text else other.token == text
    assert chosen, "a token among the most probable ones is spelled there as in the text"


def test_who_watches_changes_nothing(client: openai.OpenAI, url: str) -> None:
    """The dashboard reads every token, too: none is too broken for it, and it shows what the client gets."""
    alone = [ask(client, seed=seed)["text"] for seed in range(4)]
    assert any("\ufffd" in text for text in alone), "all of these are UTF-8"
    with urllib.request.urlopen(f"{url}/dashboard/events") as events:
        json.loads(events.readline().removeprefix(b"data: "))
        watched = [ask(client, seed=seed, stream=True)["text"] for seed in range(4)]
        seen: dict[int, str] = {}
        ended = 0
        while ended < 4:
            line = events.readline()
            for moment in json.loads(line.removeprefix(b"data: "))["moments"] if line.startswith(b"data") else []:
                if moment["is"] == "commit":
                    number = moment["generation"]
                    seen[number] = seen.get(number, "") + "".join(moment["texts"])
                elif moment["is"] == "end":
                    seen[moment["generation"]] += moment["text"]
                    ended += 1
    assert watched == alone
    assert [text.lstrip(" ") for text in seen.values()] == [text.lstrip(" ") for text in alone]


def test_an_answer_continues_its_prompt(client: openai.OpenAI, model: Path) -> None:
    """Prompt and answer together are the text of all tokens, with the space between them."""
    tokenizer = Tokenizer(model)
    spaces = 0
    for seed in range(12):
        answer = ask(client, seed=seed, max_tokens=4)
        first = answer["logprobs"]["tokens"][0]
        assert answer["text"].startswith(first) or first.startswith("bytes:")
        spaces += first.startswith(" ")
    assert spaces, "no answer begins with a space"
    assert tokenizer.encode("heat flows")[0] == 1
