"""A model without asyncio: in a script, and beside an event loop that runs. However it ends, no process and no thread is left."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import dsi_actors
from support.engines import make_byte_model
from support.patience import limit_s, wait_until
from support.timed import gone, timed_config, wait_for_end

QUESTION = "Why is the sky blue?"
#: Prints the worker's process id once the model is ready.
SCRIPT = """
import sys, dsi_actors

model = dsi_actors.open(engine="trigrams", target=sys.argv[1], drafter=None, sp=1, devices=("cpu",))
print(*model.process_ids, flush=True)
"""
#: More than the test waits for.
LONG = 'for piece in model.generate_text("the", max_tokens=1900, ignore_eos=True): print("piece", flush=True)'


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dsi_actors.Config:
    model = str(make_byte_model(tmp_path_factory.mktemp("bytes")))
    return dsi_actors.Config(
        target=model, drafter=None, sp=1, devices=("cpu",), silence_ms=600_000, request_timeout_s=600, ready_timeout_s=600
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: dsi_actors.Config, forked_workers: None) -> Iterator[dsi_actors.Model]:
    with dsi_actors.open(config) as opened:
        yield opened


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dsi-actors"]


def ask_without_end(model: dsi_actors.Model) -> None:
    while True:
        model.answer("x", max_tokens=400, ignore_eos=True)


def running(model: dsi_actors.Model) -> int:
    return model._thread.orchestrator.running


def test_it_answers_as_an_orchestrator_does(model: dsi_actors.Model) -> None:
    answer = model.answer(QUESTION, max_tokens=30, temperature=1, seed=3)
    assert answer.finish_reason == "length"
    pieces = model.generate_text([{"role": "user", "content": QUESTION}], max_tokens=30, temperature=1, seed=3)
    assert "".join(pieces) == answer
    assert tuple(pieces.token_ids) == answer.token_ids
    assert pieces.report().tokens == 30
    assert list(pieces) == []


async def test_it_works_inside_an_event_loop(model: dsi_actors.Model) -> None:
    """As in Jupyter, whose cells run inside of one."""
    assert asyncio.get_running_loop().is_running()
    assert model.answer("x", structure=dsi_actors.Structure.choice(["🙂 yes"])) == "🙂 yes"
    assert "".join(model.generate_text("x", structure=dsi_actors.Structure.choice(["🙂 yes"]), stop=" y")) == "🙂"


def test_threads_share_it(model: dsi_actors.Model) -> None:
    expected = model.answer("x", max_tokens=20)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: model.answer("x", max_tokens=20), range(8))) == {expected}


def test_leaving_the_loop_cancels(model: dsi_actors.Model) -> None:
    for _ in model.generate_text("x", max_tokens=400, ignore_eos=True):
        break
    wait_until(lambda: running(model) == 0)
    pieces = model.generate_text("x", max_tokens=400, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert running(model) == 0
    assert list(pieces) == []


def test_ctrl_c_cancels_the_answer_and_the_model_goes_on(model: dsi_actors.Model) -> None:
    def press() -> None:
        wait_until(lambda: running(model) == 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ask_without_end(model)
    thread.join()
    wait_until(lambda: running(model) == 0)
    assert model.answer("x", max_tokens=5).report.tokens == 5


@pytest.mark.usefixtures("forked_workers")
def test_after_the_end_nothing_is_left_and_it_says_so(config: dsi_actors.Config) -> None:
    before = threads()
    model = dsi_actors.open(config)
    with model:
        processes = model.process_ids
        pieces = model.generate_text("x", max_tokens=400, ignore_eos=True)
        next(pieces)
        assert not gone(processes)
        assert len(threads()) == len(before) + 1
    assert gone(processes)
    assert threads() == before
    for again in (lambda: model.answer("x"), lambda: next(pieces), lambda: model.generate_text("x").report()):
        with pytest.raises(dsi_actors.OrchestratorClosed, match="the model is closed: open it again"):
            again()
    model.close()


@pytest.mark.usefixtures("forked_workers")
def test_a_model_that_nobody_refers_to_ends(config: dsi_actors.Config) -> None:
    before = threads()
    model = dsi_actors.open(config)
    processes = model.process_ids
    del model
    gc.collect()
    wait_for_end(processes)
    wait_until(lambda: threads() == before)


@pytest.mark.usefixtures("forked_workers")
def test_closing_ends_an_answer_in_another_thread(config: dsi_actors.Config) -> None:
    with ThreadPoolExecutor(1) as pool, dsi_actors.open(config) as model:
        asked = pool.submit(ask_without_end, model)
        wait_until(lambda: running(model) == 1)
        model.close()
        with pytest.raises(dsi_actors.OrchestratorClosed):
            asked.result(limit_s())


@pytest.mark.usefixtures("forked_workers")
def test_what_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    before = threads()
    with pytest.raises(dsi_actors.ConfigError, match="the engine timed stands for a model and says no text"):
        dsi_actors.open(timed_config())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(dsi_actors.ConfigError, match=r"tokenizer\.json"):
        dsi_actors.open(target=str(tmp_path), engine="trigrams")
    with pytest.raises(dsi_actors.ConfigError, match="give a Config or its fields, not both: put sp into the Config"):
        dsi_actors.open(timed_config(), sp=2)
    with pytest.raises(dsi_actors.WorkerStartError, match="did not start"):
        dsi_actors.open(target=str(make_byte_model(tmp_path)), drafter=None, target_options={"dtype": "none"}, sp=1)
    assert threads() == before


@pytest.mark.parametrize(
    ("rest", "status", "said"),
    [
        ("with model: model.answer('the', max_tokens=5)", 0, ""),
        ("model.answer('the', max_tokens=5)", 0, ""),
        ("pieces = model.generate_text('the', max_tokens=1900); next(pieces)", 0, ""),
        pytest.param("sys.exit('enough')", 1, "enough\n", marks=pytest.mark.long),
        pytest.param("with model: raise SystemExit(3)", 3, "", marks=pytest.mark.long),
    ],
)
def test_a_script_leaves_nothing_however_it_ends(example_model: Path, rest: str, status: int, said: str) -> None:
    """Also one that closes nothing: the interpreter's end does."""
    command = [sys.executable, "-c", SCRIPT + rest, str(example_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s(120))
    assert (done.returncode, done.stderr) == (status, said)
    [worker] = map(int, done.stdout.split())
    assert gone([worker])


@pytest.mark.parametrize("rest", [LONG, f"with model:\n    {LONG}"])
def test_ctrl_c_ends_a_script_and_its_workers(example_model: Path, rest: str) -> None:
    command = [sys.executable, "-c", SCRIPT + rest, str(example_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        worker = int(script.stdout.readline())
        assert script.stdout.readline() == "piece\n"
        script.send_signal(signal.SIGINT)
        _, said = script.communicate(timeout=limit_s(120))
        assert script.returncode == -signal.SIGINT
        assert said.endswith("KeyboardInterrupt\n")
        assert gone([worker])


def test_ctrl_c_while_it_is_opened(example_model: Path) -> None:
    rest = SCRIPT.replace("model = ", "print(flush=True)\nmodel = ")
    command = [sys.executable, "-c", rest, str(example_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        script.stdout.readline()
        parent = psutil.Process(script.pid)
        workers = wait_until(lambda: [child.pid for child in parent.children()])
        script.send_signal(signal.SIGINT)
        _, said = script.communicate(timeout=limit_s(120))
        assert script.returncode == -signal.SIGINT, said
        assert said.endswith("KeyboardInterrupt\n")
        assert gone(workers)
