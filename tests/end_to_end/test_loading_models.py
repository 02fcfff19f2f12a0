"""From the command line: what a model says of itself is used, and what cannot be loaded is said in one sentence."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

import dsi_actors
from dsi_actors.tokenizer import Tokenizer
from serving.test_openai import served
from support.adapters import make_adapter
from support.engines import make_tiny_model
from support.fork_server import run_forked
from support.patience import limit_s

PROMPT = "w3 w1 w4 w1 w5 w9 w2 w6"
PLAIN = ("--sp", "1", "--max-tokens", "20", "--ignore-eos", "--json", "--no-calibration")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def generate(model: Path, *arguments: str, drafter: str = "none") -> subprocess.CompletedProcess[str]:
    words = ["generate", PROMPT, "--target", str(model), "--drafter", drafter, *PLAIN, *arguments]
    return run_forked("dsi_actors.cli.main", *words)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_models_own_sampling_is_the_default_of_generate_and_serve(model: Path) -> None:
    greedy = result_of(generate(model))
    assert (greedy["sampling"]["temperature"], greedy["sampling"]["top_k"]) == (0.0, None)
    file = model / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 5}))
    done = generate(model, "--seed", "3")
    own = result_of(done)
    assert own["sampling"] == {
        "temperature": 0.7, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 3
    }  # fmt: skip
    assert "temperature 0.7, top_k 5" in done.stderr
    assert "by the model's generation_config.json" in done.stderr
    assert own["token_ids"] != greedy["token_ids"]
    assert result_of(generate(model, "--seed", "3", "--temperature", "0"))["token_ids"] == greedy["token_ids"]
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "seed": 3}
    with (
        served(model, "--drafter", "none", "--no-calibration") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        by_default = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
        given = client.completions.create(**asked, temperature=0, extra_body={"ignore_eos": True}).choices[0].text
    assert by_default == own["text"]
    assert given == greedy["text"]


@pytest.fixture(scope="module")
def adapter(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return make_adapter(tmp_path_factory.mktemp("adapter"), whole)


@pytest.mark.long
def test_an_adapter_changes_the_text_of_target_and_drafter(
    whole: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    plain = result_of(generate(whole))
    adapted = result_of(generate(whole, "--adapter", str(adapter)))
    assert adapted["token_ids"] != plain["token_ids"]
    by_setting = result_of(generate(whole, "--set", f"target.adapter={adapter}", "--compare", drafter="self-int8"))
    assert by_setting["identical"]
    assert by_setting["results"][0]["token_ids"] == adapted["token_ids"]
    assert by_setting["results"][1]["acceptance_rate"] > 0.5  # the drafter has the adapter, too
    refused = generate(whole, "--adapter", str(tmp_path / "nowhere"))
    assert refused.returncode == 1
    assert "there is no directory" in refused.stderr.splitlines()[-1]


@pytest.mark.long
async def test_a_worker_has_an_adapter_of_its_own_place(
    whole: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSI_CACHE", str(tmp_path / "cache"))
    expected = result_of(generate(whole, "--adapter", str(adapter)))["token_ids"]
    named = {"adapter": "/where/the/orchestrator/has/it"}
    config = dsi_actors.Config(
        target=str(whole), drafter=None, listen=f"ipc://{tmp_path}/dsi.sock", target_options=named, calibrate=False
    )
    async with dsi_actors.Orchestrator(config) as orchestrator:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dsi_actors.worker", "--gpu", "cpu", "--connect", orchestrator.endpoint, "--once",
            "--adapter", str(adapter), stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=limit_s(120))
            prompt = Tokenizer(whole).encode(PROMPT)
            found: list[int] = []
            async with orchestrator.generate(prompt, dsi_actors.Sampling(max_tokens=20), algorithm="ar") as stream:
                async for tokens in stream:
                    found += tokens
        finally:
            worker.kill()
            await worker.wait()
    assert found == expected


def without_a_layer(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(kept, model / "model.safetensors")


def an_index_of_files_that_are_not_there(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_a_layer, "missing: model.layers.1.input_layernorm.weight"),
        (an_index_of_files_that_are_not_there, "model-00001-of-00002.safetensors is missing"),
        (lambda model: (model / "config.json").write_text("gibberish"), "config.json is"),
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "tokenizer.json").write_text(""), "tokenizer.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights (model.safetensors is missing)"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_sentence(model: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(model)
    done = generate(model)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert reason in done.stderr.splitlines()[-1]
    assert str(model) in done.stderr.splitlines()[-1]
