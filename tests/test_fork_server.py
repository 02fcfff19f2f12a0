"""A forked command or worker is a process like any other: arguments, streams, environment, signals, exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.fork_server import Forked, OtherEnvironmentError, run_forked
from support.forked_process import ForkedProcess
from support.patience import limit_s

MAIN = "dsi_actors.cli.main"


@pytest.mark.parametrize("words", [["plan", "--json"], ["generate", "w1", "--sp", "0"], ["bench", "nonsense"]])
def test_it_says_and_returns_what_a_command_does(words: list[str]) -> None:
    real = subprocess.run([sys.executable, "-m", MAIN, *words], capture_output=True, text=True, check=False)
    forked = run_forked(MAIN, *words)
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


def test_it_has_the_directory_and_the_environment_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    done = run_forked(MAIN, "keys", "new", "keys", "worker")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "keys").is_dir()


def test_it_is_not_forked_where_a_library_would_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    run_forked(MAIN, "--version")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(OtherEnvironmentError, match="OMP_NUM_THREADS"):
        Forked(MAIN, ["--version"], os.environ, (0, 1, 2))
    assert run_forked(MAIN, "--version").stdout.startswith("dsi-actors"), "by a real process"


def test_a_signal_ends_it() -> None:
    with open(os.devnull, "r+b") as nothing:
        forked = Forked(
            "dsi_actors.worker", ["--gpu", "cpu", "--connect", "ipc:///tmp/nobody"], os.environ, (nothing,) * 3
        )
    assert psutil.Process(forked.pid).ppid() != os.getpid()
    os.kill(forked.pid, signal.SIGKILL)
    assert forked.wait() == -signal.SIGKILL


def test_one_that_goes_on_is_read_and_ended_like_any_other() -> None:
    with ForkedProcess("dsi_actors.worker", "--gpu", "cpu", "--connect", "ipc:///tmp/nobody") as worker:
        assert worker.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=0.0)
        worker.kill()
        said = worker.communicate(timeout=limit_s())
        assert (worker.returncode, said[0]) == (-signal.SIGKILL, "")
        worker.terminate()  # it has ended: nothing happens
