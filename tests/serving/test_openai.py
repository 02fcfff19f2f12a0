"""The service in a process of its own, asked by the official `openai` client."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from support.engines import make_tiny_model
from support.forked_process import start
from support.patience import limit_s, wait_until

MESSAGES: Any = [{"role": "user", "content": "w5 w6 w7"}]
KEY = "sk-test"


@contextmanager
def served(model: Path, *arguments: str, log: Path | None = None) -> Iterator[str]:
    """The base URL of a service with one target server and a drafter. What it says goes to `log`."""
    words = ["serve", "--target", str(model), "--sp", "1", "--port", "0", "--model-name", "tiny", "--gpu", "cpu"]
    with start("dsi_actors.cli.main", *words, "--log-level", "info", *arguments) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                found = re.search(r"serving .* at (http://[^/]+)/v1", line)
                if found is not None:
                    break
            else:
                raise AssertionError("the service did not start")
            yield found.group(1)
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=limit_s(90))
            assert "Traceback" not in errors, errors
            if log is not None:
                log.write_text("".join(said) + errors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\nsk-other\n")
    with served(model, "--api-keys", str(keys)) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def metric(url: str, name: str) -> float:
    """The sum over all its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_answers_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 30, "seed": 7, "temperature": 0.8,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 30, 33)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_the_text_does_not_depend_on_how_it_is_decoded(client: openai.OpenAI) -> None:
    texts = set()
    for options in ({"algorithm": "ar"}, {"algorithm": "si", "lookahead": 3}, {"algorithm": "dsi", "lookahead": 2}):
        answer = client.completions.create(
            model="tiny", prompt="w5 w6 w7", max_tokens=25, seed=3, temperature=0.7, extra_body={"dsi": options}
        )
        texts.add(answer.choices[0].text)
        [cost] = answer.model_extra["dsi"]  # type: ignore[index]
        assert (cost["algorithm"], cost["seed"]) == (options["algorithm"], 3)
        tokens = answer.usage.completion_tokens if answer.usage is not None else 0
        if options["algorithm"] == "ar":
            assert cost["drafter"] == ""
            assert cost["target_forwards"] - cost["wasted_target_forwards"] == tokens
            if (
                answer.choices[0].finish_reason == "length"
            ):  # behind a stop the server goes on by itself until it hears of it
                assert cost["wasted_target_forwards"] == 0
        assert 0 < cost["target_forwards"] - cost["wasted_target_forwards"] <= tokens, "each of them gave a token"
        assert cost["target_busy_ms_per_token"] > 0
    assert len(texts) == 1


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "w5 w6 w7", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole.split()[10]
    for stream in (False, True):
        if stream:
            chunks = list(client.completions.create(**asked, stop=["nothing", stop], stream=True))
            text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
        else:
            answer = client.completions.create(**asked, stop=stop).choices[0]
            text, reason = answer.text, answer.finish_reason
        assert text == whole[: whole.find(stop)]
        assert reason == "stop"


def test_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, seed=1)
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    assert all(token.logprob <= 0 for token in logprobs.content)
    assert "".join(token.token for token in logprobs.content) == chat.choices[0].message.content
    plain = client.completions.create(model="tiny", prompt="w5", max_tokens=8, logprobs=0, seed=1).choices[0].logprobs
    assert plain is not None
    assert plain.token_logprobs is not None
    assert len(plain.token_logprobs) == 8


def test_the_most_probable_tokens_are_the_same_whatever_is_drafted(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": ["w5 w6", "w7"], "max_tokens": 12, "logprobs": 3, "seed": 1}
    found: list[Any] = []
    for algorithm in ("ar", "si", "dsi"):
        made = client.completions.create(**asked, extra_body={"ignore_eos": True, "dsi": {"algorithm": algorithm}})
        found.append([choice.logprobs for choice in made.choices])
    assert found[0] == found[1] == found[2]
    for logprobs in found[0]:
        for token, logprob, tops in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert tops[token] == logprob
            assert 3 <= len(tops) <= 4
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=5, temperature=0
    )
    assert chat.choices[0].logprobs is not None
    for each in chat.choices[0].logprobs.content or ():
        assert (each.token, each.logprob) == (each.top_logprobs[0].token, each.top_logprobs[0].logprob)
        assert [other.logprob for other in each.top_logprobs] == sorted(
            (other.logprob for other in each.top_logprobs), reverse=True
        )
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.completions.create(model="tiny", prompt="w5", logprobs=6)


def test_the_usage_tells_what_of_the_prompt_was_cached(client: openai.OpenAI) -> None:
    prompt = " ".join(f"w{number * 11 % 90}" for number in range(150))
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 128]
    chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2}
    *_, last = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 128


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_evaluation_gets_the_log_probabilities_of_its_prompts(
    client: openai.OpenAI, model: Path, max_tokens: int
) -> None:
    """What lm-evaluation-harness asks by its local-completions, and how it reads the answer."""
    import torch
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    prompts = [[5, 6, 7, 8], [number * 7 % 90 for number in range(300)], [9, 9]]
    contexts = [1, 290, 1]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True, seed=1234
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 306
    assert answer.usage.completion_tokens == 3 * max_tokens
    for choice, prompt, context in zip(answer.choices, prompts, contexts, strict=True):
        told: Any = choice.logprobs
        words = "".join(f" w{token}" for token in prompt)[1:]
        assert choice.text.startswith(words)
        assert choice.text == "".join(told.tokens)
        assert [
            choice.text[place:][: len(own)] for place, own in zip(told.text_offset, told.tokens, strict=True)
        ] == told.tokens
        assert len(told.tokens) == len(prompt) + max_tokens
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)[context - 1 : -1]
        wanted = slice(context, -1 if max_tokens else None)
        found = told.token_logprobs[wanted]
        target = torch.tensor(prompt[context:])
        assert found == pytest.approx(expected.gather(1, target[:, None])[:, 0].tolist(), abs=1e-4)
        greedy = [logprob == max(top.values()) for logprob, top in zip(found, told.top_logprobs[wanted], strict=True)]
        assert greedy == (expected.argmax(-1) == target).tolist()
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in prompts]
    as_text = client.completions.create(
        model="tiny", prompt=texts, max_tokens=max_tokens, temperature=0, logprobs=1, echo=True
    )
    assert [choice.logprobs for choice in as_text.choices] == [choice.logprobs for choice in answer.choices]


def test_a_prompt_is_echoed_before_the_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "w5 w6", "max_tokens": 4, "seed": 1, "temperature": 0}
    plain = client.completions.create(**asked, logprobs=2).choices[0]
    echoed = client.completions.create(**asked, logprobs=2, echo=True).choices[0]
    streamed = list(client.completions.create(**asked, logprobs=2, echo=True, stream=True))
    assert echoed.text == "w5 w6" + plain.text
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text
    own: Any = plain.logprobs
    told: Any = echoed.logprobs
    assert told.token_logprobs[2:] == own.token_logprobs
    assert told.top_logprobs[2:] == own.top_logprobs
    assert told.text_offset == [0, 2, *(place + 5 for place in own.text_offset)]
    offsets = [place for chunk in streamed if (found := chunk.choices[0].logprobs) for place in found.text_offset or ()]
    assert offsets == told.text_offset
    alone = client.completions.create(**{**asked, "max_tokens": 0}, echo=True).choices[0]
    assert (alone.text, alone.finish_reason, alone.logprobs) == ("w5 w6", "length", None)
    vllm: Any = client.completions.create(**asked, extra_body={"prompt_logprobs": 2}).choices[0]
    assert vllm.text == plain.text
    first, second = vllm.prompt_logprobs
    assert first is None
    assert second["6"]["logprob"] == told.token_logprobs[1]
    assert second["6"]["decoded_token"] == " w6"
    assert sorted(each["rank"] for each in second.values() if each["rank"]) == [1, 2]
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs is for whole answers"):
        client.completions.create(**asked, stream=True, extra_body={"prompt_logprobs": 2})


def test_penalties_biases_and_bad_words_change_the_text_as_they_say(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "w5 w6 w7", "max_tokens": 24, "temperature": 0}
    more: dict[str, Any] = {"ignore_eos": True}

    def words(**fields: Any) -> list[str]:
        mine = {
            name: fields.pop(name) for name in list(fields) if name in ("bad_words", "min_tokens", "stop_token_ids")
        }
        answer = client.completions.create(**asked, **fields, extra_body={**more, **mine})
        return str(answer.choices[0].text).split()

    plain = words()
    assert len(set(words(frequency_penalty=2, presence_penalty=2))) > len(set(plain))
    assert set(words(logit_bias={"7": 100})) == {"w7"}
    assert plain[0] not in words(bad_words=[plain[0]])
    stop = int(plain[3].removeprefix("w"))
    assert len(words(stop_token_ids=[stop])) <= 4
    assert len(words(stop_token_ids=[stop], min_tokens=10)) >= 10
    assert words(stop_token_ids=[stop], min_tokens=10)[:3] == plain[:3]


def test_each_choice_has_a_seed_of_its_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 20, "temperature": 1.0}
    both = client.completions.create(**asked, n=2, seed=11)
    alone = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (11, 12)]
    assert [choice.text for choice in both.choices] == alone
    assert alone[0] != alone[1]
    without = client.completions.create(**asked)
    [cost] = without.model_extra["dsi"]
    again = client.completions.create(**asked, seed=cost["seed"])
    assert again.choices[0].text == without.choices[0].text, "the seed that was taken is told"


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"model": "other"}, 404, "there is no model 'other' here: it is 'tiny'"),
        ({"temperature": -1}, 400, "temperature must lie in"),
        ({"top_p": 0}, 400, "top_p must lie in"),
        ({"max_tokens": 0}, 400, "max_tokens: must be at least 1"),
        ({"max_tokens": 5000}, 400, "maximum context length is 512 tokens"),
        ({"messages": []}, 400, "messages: must have at least 1 of them"),
        ({"messages": [{"role": "user", "content": "w1 " * 600}]}, 400, "maximum context length is 512 tokens"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias: give a bias for each of at most 1024 token ids"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias: give biases in [-100, 100]"),
        ({"logit_bias": {"5000": 1}}, 400, "token 5000 is outside the target's vocabulary"),
        ({"extra_body": {"bad_words": [""]}}, 400, "bad_words: give at most 128 texts"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 8}, 400, "min_tokens must lie in [0, max_tokens], not 9"),
        ({"extra_body": {"stop_token_ids": [-1]}}, 400, "stop_token_ids[0]: must be at least 0"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, 400, "tools[0].function.name: must be a name"),
        ({"presence_penalty": 3}, 400, "presence_penalty must lie in [-2, 2], not 3.0"),
        (
            {"response_format": {"type": "xml"}},
            400,
            "response_format.type: must be 'text', 'json_object' or 'json_schema'",
        ),
        ({"stop": [""]}, 400, "none of them empty"),
        ({"n": 100}, 400, "n: must be at most 16"),
        ({"extra_body": {"dsi": {"algorithm": "magic"}}}, 400, "dsi.algorithm: must be 'dsi', 'si' or 'ar'"),
        ({"extra_body": {"dsi": {"speed": 9}}}, 400, "dsi: there is no field 'speed' here"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_named(
    client: openai.OpenAI, wrong: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "stream": stream, **wrong}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code == status
    assert words in str(caught.value)
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_wrong_key_is_refused(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_what_is_no_request_gets_an_error_in_the_same_shape(url: str) -> None:
    for path, body in (("/v1/chat/completions", b"{nonsense"), ("/v1/nowhere", b"{}")):
        request = urllib.request.Request(f"{url}{path}", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        with caught.value as answer:
            assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_workers(url: str, client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "w5", "max_tokens": 500,
        "extra_body": {"ignore_eos": True, "dsi": {"algorithm": "ar"}},
    }  # fmt: skip
    gone = metric(url, "dsi_requests_total")
    if stream:
        chunks = client.completions.create(**asked, stream=True)
        next(iter(chunks))
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).completions.create(**asked)
    wait_until(lambda: metric(url, "dsi_requests_total") > gone and not metric(url, "dsi_generations_running"))
    assert metric(url, "dsi_tokens_total") < 500 * 20
    assert client.completions.create(model="tiny", prompt="w5", max_tokens=2, temperature=0).choices[0].text


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are long enough not to end by themselves."""
    return make_tiny_model(tmp_path_factory.mktemp("endless"), positions=16_384)


def test_a_full_queue_says_when_to_come_again(endless: Path) -> None:
    with (
        served(endless, "--max-queue", "1", "--max-length", "16000") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        first = client.completions.create(
            model="tiny", prompt="w5", max_tokens=15_000, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="w5", max_tokens=5)
        assert caught.value.response.headers["retry-after"] == "1"
        first.close()


def test_health_and_metrics_need_no_key(url: str, client: openai.OpenAI) -> None:
    for path in ("/health", "/ready"):
        with urllib.request.urlopen(f"{url}{path}") as answer:
            assert answer.status == 200
    assert metric(url, "dsi_workers_ready") == 2
    names = ("dsi_tokens_total", "dsi_time_to_first_token_seconds_count")
    before = [metric(url, name) for name in names]
    client.completions.create(model="tiny", prompt="w5", max_tokens=7, n=2, seed=1, extra_body={"ignore_eos": True})
    assert [metric(url, name) - was for name, was in zip(names, before, strict=True)] == [14, 2]


def test_who_is_being_served_is_served_to_the_end(model: Path) -> None:
    """On SIGTERM nothing new is taken, and what runs is finished."""
    drain_s = str(limit_s(120))
    with (
        served(model, "--drain-s", drain_s) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        answer = client.completions.create(
            model="tiny", prompt="w5", max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(answer)
        next(chunks)
        port = int(url.rsplit(":", 1)[1])
        [service] = [
            child
            for child in psutil.Process().children(recursive=True)
            if any(peer.laddr.port == port for peer in child.net_connections("tcp"))
        ]
        service.terminate()
        assert list(chunks)[-1].choices[0].finish_reason == "length"
