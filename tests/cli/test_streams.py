"""Standard streams that are closed, full, read no further, or speak ASCII only; and arguments that are no text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

import dsi_actors
from support.command import dsi_actors_in_a_shell, words
from support.engines import make_tiny_model
from support.patience import limit_s
from support.timed import timed_config

PLAN = ["plan", "--target-ms", "20", "--drafter-ms", "5", "--acceptance", "0.7"]
#: A locale of ASCII, without Python's ways round it.
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def closing(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


def without(
    numbers: Sequence[int], command: Sequence[Any], stdout: int | IO[Any] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=limit_s(180), check=False, preexec_fn=closing(*numbers)
    )  # fmt: skip


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_end_no_process(numbers: tuple[int, ...]) -> None:
    """libzmq and libuv abort when they get a descriptor of 0, 1 or 2; workers have what their orchestrator has."""
    timed = ["bench", "timed", "--tokens", "2", "--repeats", "1", "--sp", "1", "--target-ms", "2", "--drafter-ms", "1"]
    done = without(numbers, words(*timed, "--json"))
    assert done.returncode == 0
    assert done.stderr == ""
    if 1 not in numbers:
        assert json.loads(done.stdout)["results"]


async def test_a_worker_serves_without_any_stream() -> None:
    async with dsi_actors.Orchestrator(timed_config(listen="tcp://127.0.0.1:*")) as orchestrator:
        command = [sys.executable, "-m", "dsi_actors.worker", "--gpu", "cpu", "--connect", orchestrator.endpoint]
        with subprocess.Popen(command, preexec_fn=closing(0, 1, 2)) as worker:  # noqa: ASYNC220  it is not waited for
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s())
            worker.terminate()


def test_a_closed_input_is_an_empty_prompt(model: Path) -> None:
    done = without([0], words("generate", "-", "--target", model))
    assert done.returncode == 1
    assert done.stderr == "dsi-actors: the prompt is empty: give some text\n"


@pytest.mark.parametrize(
    ("arguments", "statuses"),
    [
        (PLAN, {141}),
        ([*PLAN, "--json"], {141}),
        (["--help"], {0, 141}),
    ],  # argparse itself forgives whoever reads no help
    ids=["table", "JSON", "help"],
)
def test_a_reader_that_leaves_early_ends_the_command_quietly(arguments: list[str], statuses: set[int]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        both = subprocess.run(words(*arguments), stdout=pipe, stderr=pipe, timeout=limit_s(180), check=False)
        done = subprocess.run(words(*arguments), stdout=pipe, stderr=subprocess.PIPE, timeout=limit_s(180), check=False)
    assert {both.returncode, done.returncode} <= statuses
    assert done.stderr == b""


def test_a_worker_goes_on_when_nobody_reads_its_log() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dsi_actors.worker", "--gpu", "cpu", "--connect", "nonsense"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stderr=pipe, timeout=limit_s(180), check=False)
    assert done.returncode == 1
    program = (
        "from dsi_actors.logs import show_logs\nimport structlog\nshow_logs('info')\n"
        "structlog.get_logger('dsi.worker').warning('unread')"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        assert (
            subprocess.run([sys.executable, "-c", program], stderr=pipe, timeout=limit_s(180), check=False).returncode
            == 0
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [PLAN, [*PLAN, "--json"]], ids=" ".join)
def test_a_full_disk_is_named(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = without([], words(*arguments), stdout=full)
    assert done.returncode == 1
    assert done.stderr == "dsi-actors: cannot write: No space left on device\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("variable", ["locale", "PYTHONIOENCODING"])
def test_ascii_is_enough(model: Path, variable: str) -> None:
    env = ASCII if variable == "locale" else {**os.environ, variable: "ascii"}
    words = ["generate", "w1 é", "--target", str(model), "--gpu", "cpu", "--drafter", "none", "--sp", "1"]
    done = dsi_actors_in_a_shell(*words, "--max-tokens", "4", "--ignore-eos", "--no-calibration", env=env)
    assert done.returncode == 0, done.stderr
    assert "\n....\n# drafted and accepted: 0   . the target's own: 4\n" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    "arguments", [PLAN, ["simulate", "--tokens", "5"], ["--help"], ["bench", "exact", "--help"], ["bench", "no-such-é"]]
)
def test_no_command_needs_more_than_ascii(arguments: list[str]) -> None:
    done = dsi_actors_in_a_shell(*arguments, env=ASCII)
    assert done.returncode == (2 if arguments[1:] == ["no-such-é"] else 0)
    assert "Traceback" not in done.stderr
    assert (done.stdout + done.stderr).isascii()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["generate", b"w1 \xff"], "argument PROMPT: 'w1 \\udcff' is no UTF-8"),
        (["generate", "hi", "--target", b"/tmp/\xff"], "the model reference '/tmp/\\udcff' is no UTF-8"),
        (["generate", "hi", "--drafter", b"\xff"], "the model reference '\\udcff' is no UTF-8"),
        (["generate", "hi", "--listen", b"ipc:///\xff"], "listen 'ipc:///\\udcff' is no endpoint"),
        (["generate", "hi", "--gpu", b"\xff"], "'\\udcff' is no device"),
        (["serve", "--model-name", b"\xff"], "argument --model-name: '\\udcff' is no UTF-8"),
        (["status", "--key", b"\xff"], "--key has characters that no HTTP header carries"),
        (["trace", b"/nowhere/\xff"], "cannot read /nowhere/\\udcff: No such file"),
    ],
)
def test_bytes_that_are_no_text_get_one_sentence(arguments: list[str | bytes], problem: str) -> None:
    done = dsi_actors_in_a_shell(*arguments)
    assert done.returncode in (1, 2)
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_any_name_does_for_a_file(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.jsonl"
    Path(os.fsdecode(name)).write_bytes(b'{"prompt": "\xff"}')
    done = dsi_actors_in_a_shell("trace", name)
    assert done.returncode == 1
    assert "\\udcff.jsonl is no recording" in done.stderr


def test_a_prompt_that_is_no_text_on_standard_input(model: Path) -> None:
    done = subprocess.run(
        words("generate", "-", "--target", model),
        input=b"w1 \xff",
        capture_output=True,
        timeout=limit_s(180),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == b"dsi-actors: the prompt on standard input is no UTF-8\n"
