"""What a client is told of the text: the same, however it was decoded. The model's tokens are often no UTF-8."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dsi_actors.tokenizer import Tokenizer
from serving.test_openai import metric, served
from support.engines import make_tiny_model
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


def test_what_is_counted_does_not_depend_on_how_it_is_decoded(client: openai.OpenAI, url: str) -> None:
    """A block of committed tokens goes on behind a stop string: that is counted nowhere."""
    for seed in range(2):
        whole = ask(client, seed=seed)
        tokens = whole["logprobs"]["tokens"]
        places = whole["logprobs"]["text_offset"]
        stop = next(token.strip() for token in tokens[12:] if token.strip() and not token.startswith("bytes:"))
        completed_by = next(at for at in range(59) if stop in whole["text"][: places[at + 1]])
        answers = []
        for decoding in DECODINGS:
            for stream in (False, True):
                before = metric(url, "dsi_tokens_total")
                answers.append(ask(client, seed=seed, stop=stop, dsi=decoding, stream=stream))
                assert metric(url, "dsi_tokens_total") - before == answers[-1]["tokens"]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0]["text"] == whole["text"][: whole["text"].find(stop)]
        assert answers[0]["reason"] == "stop"
        assert answers[0]["tokens"] == len(answers[0]["logprobs"]["tokens"]) == completed_by + 1
        # Complete with the very last token that is allowed: it is a stop string all the same.
        assert ask(client, seed=seed, stop=stop, max_tokens=completed_by + 1) == answers[0]
        assert ask(client, seed=seed, stop=stop, max_tokens=completed_by)["reason"] == "length"


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
        logprobs=True, extra_body={"ignore_eos": True},
    ).choices[0]  # fmt: skip
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    data = b"".join(bytes(token.bytes or []) for token in chat.logprobs.content)
    assert data.decode(errors="replace") == chat.message.content
    assert any(token.token.startswith("\\x") for token in chat.logprobs.content)


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
