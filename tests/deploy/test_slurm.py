"""examples/deploy/slurm: the script runs as a job would, with stubs of Slurm's own commands and timed workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from support.engines import make_tiny_model
from support.patience import limit_s, wait_until

SCRIPT = Path(__file__).parents[2] / "examples/deploy/slurm/dsi-actors.sbatch"
TASKS = 3
#: A step of so many tasks on this machine.
SRUN = f"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'kill $(jobs -p)' TERM
for ((task = 0; task < {TASKS}; task++)); do SLURM_PROCID=$task "$@" & done
wait
"""
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.2\\n'\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = tmp_path / "bin"
    programs.mkdir()
    commands = {
        "srun": SRUN, "scontrol": SCONTROL,
        "dsi-actors": f'#!/bin/bash\nexec {sys.executable} -m dsi_actors.cli.main "$@"\n',
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }  # fmt: skip
    for name, text in commands.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": str(TASKS),
        "DSI_GPU": "cpu", "DSI_PORT": str(free_port()), "DSI_HTTP_PORT": str(free_port()),
        "DSI_STATE": str(tmp_path / "state"),
    }  # fmt: skip


def test_the_script_is_well_formed() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    for line in SCRIPT.read_text(encoding="utf-8").splitlines():
        assert not line.startswith("#SBATCH") or re.fullmatch(r"#SBATCH --[a-z-]+=\S+", line), line


def test_a_job_serves_until_it_is_told_to_end(environment: dict[str, str], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    settings = (
        "target.latency_ms=2",
        "drafter.latency_ms=1",
        "target.vocabulary_size=96",
        "drafter.vocabulary_size=96",
    )
    timed = ["--engine", "timed", "--target", str(model), *(word for each in settings for word in ("--set", each))]
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *timed], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{environment['DSI_HTTP_PORT']}"

        def workers() -> dict[str, int]:
            assert job.poll() is None, log.read_text()
            try:
                return dict(httpx2.get(f"{url}/ready", timeout=limit_s()).json())
            except httpx2.TransportError:
                return {}

        wait_until(lambda: (workers().get("targets"), workers().get("drafters")) == (TASKS - 1, 1))
        state = Path(environment["DSI_STATE"])
        assert state.stat().st_mode & 0o077 == 0
        key = (state / "api-keys").read_text().strip()
        assert key not in log.read_text()
        body = {"model": str(model), "prompt": "w1 w2", "max_tokens": 12}
        assert httpx2.post(f"{url}/v1/completions", json=body, timeout=limit_s()).status_code == 401
        answer = httpx2.post(
            f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=limit_s()
        )
        assert answer.json()["usage"]["completion_tokens"] == 12
        job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@60 does: to the script alone
        assert job.wait(limit_s(60)) == 0, log.read_text()
        assert not state.exists(), "the keys are gone"
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def test_a_job_whose_service_cannot_start_ends(environment: dict[str, str], tmp_path: Path) -> None:
    """Its workers would wait for it."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--target", str(tmp_path / "none")], env=environment, capture_output=True, text=True, check=False,
        timeout=limit_s(120),
    )  # fmt: skip
    assert done.returncode == 1
    assert "none" in done.stderr
