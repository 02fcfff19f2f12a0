"""Templates come with models from anywhere: whatever one does, it ends soon, with a text or with one sentence."""

from __future__ import annotations

import time

import pytest

from dsi_actors.errors import ConfigError
from dsi_actors.tokenization import chat_template
from dsi_actors.tokenization.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.no.such }}", "has no attribute 'no'"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ {}['x']['y'] }}", "has no attribute 'x'"),
        ("{{ messages | map(attribute='role') | first | int(none) + 1 }}", "unsupported operand"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 100000000000 }}", "a text or a list that is too long"),
        ("{{ 100000000 * [1] }}", "a text or a list that is too long"),
        ("{{ 9 ** 99999999 }}", "numbers that are too large"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "writes without an end"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}", "takes more than"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
            "takes more than",
        ),
        ("{% include 'secret' %}", "no loader"),
        ("{{ strftime_now(7) }}", "must be str"),
        ("{{ raise_exception('roles must\n\n alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_says_so_in_one_sentence(
    source: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 0.05)
    begun_s = time.thread_time()
    with pytest.raises(ConfigError, match=r"^the model's chat template failed .*: give it plain text$") as caught:
        ChatTemplate(source).render(MESSAGES, {})
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - begun_s < 5


def test_what_templates_usually_do_is_within_the_bounds() -> None:
    source = (
        "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 * 2 %}"
        "{% endfor %}{% macro show(m) %}<{{ m.role }}>{{ m.content * 1 }}{{ '-' * 3 }}{{ 2 ** 3 }}{% endmacro %}"
        "{% for m in messages[::-1] %}{{ show(m) }}{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{{ ns.last }}"
    )
    rendered = ChatTemplate(source).render(MESSAGES * 3, {})
    assert rendered == "<user>Hello---8" * 3 + "0124"
    long = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(ChatTemplate("{{ messages[0].content }}{{ messages[0].content }}").render(long, {})) == 10_000_000
