"""The dashboard in a real browser: lanes of workers, numbers, and a text coloured by how each token came."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from serving.test_openai import served
from support.chromium import CHROMIUM, Browser
from support.engines import make_tiny_model
from support.service import served as timed_service

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install Debian's package")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    return directory


def pixels(browser: Browser, colour: str) -> int:
    """How many pixels of the lanes have this colour."""
    script = """(() => { const c = document.getElementById("lanes");
      const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      const [r, g, b] = %s; let n = 0;
      for (let i = 0; i < d.length; i += 4) n += d[i] === r && d[i + 1] === g && d[i + 2] === b && d[i + 3] === 255;
      return n; })()"""
    found: int = browser.evaluate(script % [int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return found


def test_a_generation_is_seen_as_it_happens(model: Path, tmp_path: Path) -> None:
    with served(model) as url, Browser(tmp_path / "profile") as browser:
        browser.open(f"{url}/dashboard")
        browser.wait_for("document.getElementById('state')?.textContent === 'live'")
        browser.wait_for("document.getElementById('workers').textContent === '2'")
        assert pixels(browser, "#2e9e5b") == 0
        browser.evaluate("document.getElementById('prompt').value = 'w9 w9 w9'")
        browser.evaluate("document.getElementById('ask').requestSubmit()")
        browser.wait_for("document.querySelectorAll('#text span').length > 60")
        browser.wait_for("document.querySelector('#list button.picked')?.textContent.includes('length')")
        assert browser.evaluate("document.querySelectorAll('#text .own').length") > 0
        assert float(browser.evaluate("document.getElementById('rate').textContent")) > 0
        assert pixels(browser, "#2e9e5b") > 100  # verifications that counted
        # This model is as fast as its drafter, so speculation may have been left: ask for it.
        ask = (
            "fetch('/v1/completions', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify("
            "{model: 'tiny', prompt: 'w5 w6 w7', max_tokens: 200, temperature: 2, seed: %d, ignore_eos: true,"
            " dsi: {lookahead: 3}})}).then(() => { window.answered = %d; })"
        )
        seen = False
        for seed in range(1, 100):
            browser.evaluate(ask % (seed, seed))
            browser.wait_for(f"window.answered === {seed}")
            seen = pixels(browser, "#d9a441") + pixels(browser, "#c9453f") > 0  # verifications that did not count
            if seen:
                break
        assert seen, "nothing was rejected or cancelled"
        browser.screenshot(tmp_path / "dashboard.png")
        assert (tmp_path / "dashboard.png").stat().st_size > 10_000
        assert browser.errors == []


def test_only_who_has_a_key_may_watch(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-test\n")
    with served(model, "--api-keys", str(keys)) as url, Browser(tmp_path / "profile") as browser:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/dashboard/events")
        browser.open(f"{url}/dashboard")
        browser.wait_for("document.getElementById('state')?.textContent.includes('wants a key')")
        browser.open(f"{url}/dashboard?again#key=sk-test")
        browser.wait_for("document.getElementById('state')?.textContent === 'live'")


def test_an_open_dashboard_does_not_hold_up_the_end(model: Path) -> None:
    with served(model, "--drain-s", "100000") as url:  # its end is waited for; a drain takes longer
        answer = urllib.request.urlopen(f"{url}/dashboard/events")
        first = json.loads(answer.readline().removeprefix(b"data: "))
        assert [worker["role"] for worker in first["workers"]].count("target") == 1


async def test_branches_are_seen_drafted_and_taken(tmp_path: Path) -> None:
    """The drafter errs every second time; every second time an alternative of it is right then."""

    def look(port: int, browser: Browser) -> None:
        browser.open(f"http://127.0.0.1:{port}/dashboard")
        browser.wait_for("document.getElementById('state')?.textContent === 'live'")
        assert browser.evaluate("getComputedStyle(document.querySelector('.branching')).display") == "none", "not yet"
        ask = (
            "fetch('/v1/completions', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify("
            "{model: 'timed', prompt: 'w4 w8', max_tokens: 80, ignore_eos: true, dsi: {lookahead: 1, rows: 3}})})"
            ".then((answer) => answer.json()).then((answer) => { window.answer = answer; })"
        )
        browser.evaluate(ask)
        browser.wait_for("window.answer")
        browser.wait_for("document.querySelectorAll('#text span').length >= 80")
        taken = browser.evaluate("document.querySelectorAll('#text .alternative').length")
        assert taken == browser.evaluate("window.answer.dsi[0].alternatives") > 5
        assert browser.evaluate("document.querySelectorAll('.branching[hidden]').length") == 0, (
            "the legend explains them"
        )
        browser.wait_for("parseInt(document.getElementById('alternatives').textContent) > 10")
        assert pixels(browser, "#6d4fc4") > 100  # bars that carried the branch that was right
        assert pixels(browser, "#ffffff") > 100  # bars with branches
        browser.screenshot(tmp_path / "dashboard.png")
        assert browser.errors == []
        browser.open("about:blank")

    with Browser(tmp_path / "profile") as browser:
        async with timed_service(tmp_path, target_ms=30, drafter_ms=8, acceptance=0.5, alternatives=0.5) as service:
            await asyncio.to_thread(look, service.port, browser)
            metrics = await service.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            [counted] = [
                line for line in metrics.body.decode().splitlines() if line.startswith("dsi_alternatives_total")
            ]
            assert float(counted.split()[-1]) > 5
