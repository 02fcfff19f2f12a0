"""`dsi-actors` as a user types it, with a tiny random model in place of a real one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from matplotlib.image import imread

from dsi_actors.host.devices import cores
from support.command import dsi_actors_command, dsi_actors_in_a_shell
from support.command import words as command
from support.engines import make_tiny_model
from support.patience import limit_s
from support.timed import start_worker, wait_for_end

PROMPT = " ".join(f"w{number}" for number in (3, 1, 4, 1, 5, 9, 2, 6))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), words=64)


def test_a_generation_is_recorded_and_drawn(model: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    done = dsi_actors_command(
        "generate", PROMPT, "--target", model, "--max-tokens", "12", "--ignore-eos", "--record", recorded
    )
    assert done.returncode == 0, done.stderr
    assert dsi_actors_command("trace", recorded).stdout.strip() == f"{recorded}.html"
    assert "12 tokens in" in Path(f"{recorded}.html").read_text()


def test_what_was_cut_off_is_resumed(model: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        PROMPT,
        "--target",
        str(model),
        "--drafter",
        "none",
        "--sp",
        "1",
        "--max-tokens",
        "20",
        "--json",
    ]
    words += ["--temperature", "0.8", "--seed", "4"]
    whole = json.loads(dsi_actors_command(*words, "--ignore-eos").stdout)
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps({"token_ids": whole["token_ids"][:7]}))
    rest = json.loads(dsi_actors_command(*words, "--ignore-eos", "--resume", cut).stdout)
    assert (rest["token_ids"], rest["text"]) == (whole["token_ids"], whole["text"])
    assert rest["tokens"] == 13
    cut.write_text("[]")
    done = dsi_actors_command(*words, "--resume", cut)
    assert done.returncode == 1
    assert "has no token_ids: give what an earlier run printed with --json" in done.stderr


def test_generate_prints_one_json_object(model: Path) -> None:
    done = dsi_actors_in_a_shell(
        "generate", PROMPT, "--target", model, "--gpu", "cpu", "--sp", "2", "--max-tokens", "12", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["token_ids"]) == result["tokens"] == 12
    assert result["text"] == "".join(f" w{token}" for token in result["token_ids"]), "it continues the prompt"
    assert (result["algorithm"], result["sp"], result["finish_reason"]) == ("dsi", 2, "length")
    assert len(result["accepted"]) == len(result["by_alternative"]) == 12
    assert sum(result["by_alternative"]) == result["alternatives"]
    expected = {
        "ms_per_token", "first_token_ms", "acceptance_rate", "target_forwards", "wasted_target_forwards",
        "target_busy_ms", "drafter_busy_ms", "lookahead",
    }  # fmt: skip
    assert expected <= set(result)


@pytest.mark.parametrize("drafter", ["self-int8", "self-int4", "ngram", "none", "same model", "another vocabulary"])
def test_compare_finds_the_three_algorithms_identical(model: Path, other_model: Path, drafter: str) -> None:
    drafter = {"same model": str(model), "another vocabulary": str(other_model)}.get(drafter, drafter)
    done = dsi_actors_command(
        "generate", PROMPT, "--target", model, "--drafter", drafter, "--gpu", "cpu", "--sp", "2",
        "--max-tokens", "24", "--compare", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True
    assert [row["algorithm"] for row in result["results"]] == ["ar", "si", "dsi"]
    assert [row["tokens"] for row in result["results"]] == [24, 24, 24]
    if drafter == str(other_model):
        assert result["results"][1]["drafted_tokens"] > 0  # in the target's tokens, or they would not have been taken
    if drafter == str(model):
        assert result["results"][1]["acceptance_rate"] > 0.5  # it guesses in int8


SAMPLED = ["--temperature", "0.9", "--top-p", "0.95", "--top-k", "40", "--repetition-penalty", "1.1", "--seed", "17"]


@pytest.mark.parametrize("drafter", ["self-int8", "ngram"])
def test_sampled_text_does_not_depend_on_the_algorithm_or_the_drafter(model: Path, drafter: str) -> None:
    words: list[str | Path] = ["generate", PROMPT, "--target", model, "--drafter", drafter]
    words += ["--gpu", "cpu", "--max-tokens", "30", "--json"]
    compared = json.loads(dsi_actors_command(*words, *SAMPLED, "--compare").stdout)
    assert compared["identical"] is True
    assert compared["results"][0]["token_ids"] == SAMPLED_TEXT.setdefault("text", compared["results"][0]["token_ids"])
    if drafter == "ngram":
        other_seed = json.loads(dsi_actors_command(*words, *SAMPLED[:-1], "18").stdout)
        assert other_seed["token_ids"] != compared["results"][0]["token_ids"]


#: What the first drafter's run gave; the others must give the same.
SAMPLED_TEXT: dict[str, list[int]] = {}
PLAN = ["plan", "--target-ms", "20", "--drafter-ms", "5", "--acceptance", "0.7"]


def test_prompts_cannot_be_chat_messages_for_a_model_without_a_template(model: Path, prompts: Path) -> None:
    done = dsi_actors_command("bench", "real", "--target", model, "--prompts", prompts, "--chat", "--library", "none")
    assert done.returncode == 1
    assert "has no chat template" in done.stderr


@pytest.mark.long
def test_bench_gpu_measures_a_device_against_its_limit() -> None:
    words = [
        "bench",
        "gpu",
        "--gpu",
        "cpu",
        "--shapes",
        "tiny",
        "--widths",
        "1,8,80",
        "--repeats",
        "3",
        "--context",
        "64",
    ]
    words += ["--generations", "1,3", "--prompts", "300,20", "--chunk", "256"]
    done = dsi_actors_command(*words, "--json")
    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout)["results"]
    assert [row["positions"] for row in result["prompts"]] == [300, 20]
    for row in result["prompts"]:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["positions"] / row["ms"])
        assert row["tflops"] > 0
        assert row["of_peak"] is None, "the peak rate of this CPU is not known"
    assert result["prompts"][0]["worst_cancel_to_free_ms"] > 0
    assert result["prompt_chunk"] == 256
    assert [row["width"] for row in result["forwards"]] == [1, 8, 80]
    assert all(row["over_floor"] > 1 for row in result["forwards"])
    for row in result["forwards"]:
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["ms"] <= row["worst_ms"]
    assert 0 < result["cancel_to_free_ms"] <= result["worst_cancel_to_free_ms"]
    assert 8 in result["same_bits"]["widths"]
    assert [row["generations"] for row in result["decoding"]] == [1, 3]
    for row in result["decoding"]:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["generations"] / row["step_ms"])
    together = result["together"]
    assert len(together["each_ms"]) == together["processes"] == 2
    assert together["slower"] == pytest.approx(sum(together["each_ms"]) / 2 / together["alone_ms"])
    for wrong, problem in (("--shapes=7b", "--shapes 7b is unknown"), ("--widths=0", "each must lie in [1, 256]")):
        assert problem in dsi_actors_command("bench", "gpu", wrong).stderr


@pytest.mark.long
def test_bench_start_says_where_the_time_goes(model: Path) -> None:
    done = dsi_actors_command("bench", "start", "--target", model, "--drafter", "none", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert next(iter(steps)) == "target is up and has said hello"
    assert list(steps)[-1] == "the first token is there"
    times_ms = [step["ms"] for step in steps.values()]
    assert times_ms == sorted(times_ms)
    assert len(steps) == 6


def test_bench_exact_compares_every_way(model: Path, prompts: Path) -> None:
    done = dsi_actors_command(
        "bench", "exact", "--target", model, "--prompts", prompts, "--max-tokens", "8", "--servers", "2", "--limit", "2",
        "--dtypes", "float32", "--gpu", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ways = 1 + 5 + 2 * 5  # AR, SI and DSI at four lookaheads and with a tree, DSI at two SP
    assert result["compared"] == 3 * 2 * 2 * ways - 2 * 2  # three drafters, two prompts, greedy and sampled
    assert result["differing"] == 0
    assert {row["drafter"] for row in result["results"]} == {"self-int8", "ngram", "random"}
    assert {row["rows"] for row in result["results"]} == {0, 1, 4}
    assert sum(row["compared"] for row in result["results"]) == result["compared"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "one", "prompt": PROMPT}) + "\n" + json.dumps({"prompt": "w5 w6"}) + "\n")
    return file


@pytest.mark.long
def test_bench_exact_cost_measures_both_paths(tmp_path: Path, prompts: Path) -> None:
    model = make_tiny_model(tmp_path / "divided", kv_heads=2)
    done = dsi_actors_command(
        "bench", "exact-cost", "--target", model, "--prompts", prompts, "--max-tokens", "6", "--repeats", "2", "--tp", "2",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(row["dtype"], row["path"]) for row in rows] == [
        (dtype, path)
        for dtype in ("float32", "bfloat16")
        for path in ("exact (AR)", "exact (AR), group of 2", "transformers generate")
    ]
    for row in rows:
        assert row["generations"] == 4
        assert 1 << 20 < row["private_bytes"] <= row["resident_bytes"], "of a process, not of nothing"


def spread_of(row: dict[str, Any]) -> float:
    return 5 * max(float(row["standard_error"]), 0.01)


@pytest.mark.long
def test_bench_acceptance_of_a_weakened_drafter_that_is_greedy(model: Path, prompts: Path) -> None:
    def measured(*more: str) -> dict[str, Any]:
        done = dsi_actors_command(
            "bench", "acceptance", "--target", model, "--prompts", prompts, "--max-tokens", "20", "--temperatures", "0",
            "--json", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        [row] = json.loads(done.stdout)["results"]
        assert row["lower"] is row["upper"] is None
        return dict(row)

    assert measured("--layers", "1")["acceptance_rate"] < 0.5 < measured()["acceptance_rate"]


@pytest.mark.long
def test_bench_acceptance_lies_within_its_bounds(model: Path, prompts: Path) -> None:
    """A tiny model and its int8 copy: 2 x 80 tokens. Five standard errors below, or above, would be a bug."""
    done = dsi_actors_command(
        "bench", "acceptance", "--target", model, "--prompts", prompts, "--max-tokens", "80", "--temperatures", "0.7,2",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["results"]:
        assert 0 < row["lower"] < row["upper"] < 1
        *bins, whole = row["choices"]
        assert sum(each["positions"] for each in bins) == whole["positions"] == row["positions"]
        assert whole["first"] + whole["second"] + whole["third_to_fifth"] <= 1
        assert abs(whole["first"] - row["acceptance_rate"]) < spread_of(row)
        assert row["positions"] == 160
        assert row["drafts_compared"] > 30, row
        spread = spread_of(row)
        assert row["lower"] - spread < row["acceptance_rate"] < row["upper"] + spread


def test_simulate_agrees_with_the_closed_forms() -> None:
    done = dsi_actors_command(
        "simulate", "--target-ms", "20", "--drafter-ms", "5", "--acceptance", "0.7", "--sp", "4", "--tokens", "1000",
        "--repeats", "6", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ar, si, dsi = json.loads(done.stdout)["results"]
    assert [row["algorithm"] for row in (ar, si, dsi)] == ["ar", "si", "dsi"]
    assert ar["ms_per_token"] == pytest.approx(20)
    assert dsi["ms_per_token"] == pytest.approx(0.7 * 5 + 0.3 * 20, rel=0.02)
    assert dsi["ms_per_token"] < si["ms_per_token"] < ar["ms_per_token"]


def test_what_was_generated_can_be_simulated(model: Path, tmp_path: Path) -> None:
    done = dsi_actors_command(
        "generate", PROMPT, "--target", model, "--gpu", "cpu", "--lookahead", "2", "--max-tokens", "30", "--json"
    )
    assert done.returncode == 0, done.stderr
    trace = json.loads(done.stdout)["trace"]
    assert trace["drafter_ms"]
    assert trace["accepted"]
    (tmp_path / "run.json").write_text(done.stdout)
    again = dsi_actors_command(
        "simulate", "--trace", tmp_path / "run.json", "--tokens", "30", "--repeats", "1", "--json"
    )
    assert again.returncode == 0, again.stderr
    plain = json.loads(again.stdout)["results"][0]
    assert plain["algorithm"] == "ar"
    assert min(trace["target_ms"]) <= plain["ms_per_token"] <= max(trace["target_ms"]), "it takes what was measured"


def test_plan_names_the_servers_worth_having(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    words = ["plan", "--target-ms", "20", "--drafter-ms", "5", "--acceptance", "0.7", "--gpus", "8"]
    done = dsi_actors_command(*words, "--picture", picture, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["equation_1_servers"] == 4
    assert plan["limit_ms_per_token"] == pytest.approx(9.5)
    assert 2 <= plan["servers_worth_having"] <= 4
    dsi = [row for row in plan["results"] if row["algorithm"] == "dsi"]
    assert [row["sp"] for row in dsi] == list(range(1, 8))
    assert [row["ms_per_token"] for row in dsi] == sorted((row["ms_per_token"] for row in dsi), reverse=True)
    assert dsi[3]["ms_per_token"] == pytest.approx(9.5, rel=0.001)
    assert dsi[3]["gpu_seconds_per_token"] == pytest.approx(5 * 9.5e-3, rel=0.001)
    assert picture.read_text().startswith("<?xml")
    [best] = [row for row in plan["results"] if row["best"]]
    assert best["sp"] == plan["servers_worth_having"]
    assert "Speculation is not worth" in dsi_actors_command(*words[:4], "40", *words[5:]).stdout


def test_plan_divides_gpus_by_degree_and_clients() -> None:
    words = [
        "plan",
        "--target-ms",
        "18.3",
        "--target-ms",
        "tp4=6.1",
        "--target-ms",
        "tp2=10.4",
        *PLAN[3:],
        "--gpus",
        "8",
    ]
    done = dsi_actors_command(*words, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    ways = [(row["tp"], row["sp"], row["drafter"]) for row in rows]
    own = {1: 7, 2: 3, 4: 1}  # the most servers beside the drafter's GPU
    assert ways == [
        way
        for tp, most in own.items()
        for way in [(tp, 1, "none"), (tp, 1, "shared"), *((tp, sp, "own") for sp in range(1, most + 1))]
    ]
    assert all(row["gpus"] == row["tp"] * row["servers"] + (row["drafter"] == "own") <= 8 for row in rows)
    assert sum(row["best"] for row in rows) == sum(row["cheapest"] for row in rows) == 1
    done = dsi_actors_command(*words, "--clients", "4", "--position-ms", "0.1")
    assert "Best: TP=4 SP=1, 4 generations on a server" in done.stdout
    assert "tokens/s" in done.stdout


def test_bench_timed_stands_beside_its_ideal() -> None:
    done = dsi_actors_command("bench", "timed", "--tokens", "20", "--repeats", "2", "--sp", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(row["algorithm"], row["lookahead"]) for row in rows[:5]] == [
        ("ar", 0), ("si", 4), ("si", 1), ("si", 5), ("si", 10),
    ]  # fmt: skip
    for row in rows:
        assert row["ideal_ms_per_token"] <= row["ms_per_token"] * 1.001, "nothing is faster than its ideal"


@pytest.mark.long
def test_bench_long_compares_a_short_and_a_long_text(model: Path) -> None:
    words = ["bench", "long", "--tokens", "16", "--repeats", "2", "--json"]
    done = dsi_actors_command(*words, "--positions", "400,20")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    ways = ["AR", "SI", "DSI SP=2 chain", "DSI SP=2 tree", "DSI SP=2 ngram"]
    assert [(row["way"], row["positions"]) for row in rows] == [(way, length) for way in ways for length in (20, 400)]
    for row in rows:
        assert row["fastest_ms_per_token"] <= row["ms_per_token"] <= row["slowest_ms_per_token"]
        assert row["ratio_to_shortest"] == 1 or row["positions"] == 400
        assert row["orchestrator_processor_ms_per_token"] > 0
    real = [*words, "--target", str(model), "--drafter", "ngram", "--gpu", "cpu", "--sp", "1"]
    done = dsi_actors_command(*real, "--positions", "40,300,4000")
    assert done.returncode == 0, done.stderr
    assert "lengths over 496 are left out: the target takes 512 positions" in done.stderr
    rows = json.loads(done.stdout)["results"]
    ways = ["AR", "SI ngram", "DSI SP=1 chain ngram", "DSI SP=1 tree ngram"]
    assert [(row["way"], row["positions"]) for row in rows] == [(way, length) for way in ways for length in (40, 300)]
    done = dsi_actors_command(*real, "--positions", "4000")
    assert done.returncode == 1
    assert "no length of --positions and --tokens 16 fit the target's limit of 512 positions" in done.stderr


def test_bench_table2_prints_the_papers_factors() -> None:
    done = dsi_actors_command(
        "bench", "table2", "--pairs", "2", "--skip", "1", "--tokens", "10", "--repeats", "1", "--sp", "1,2"
    )
    assert done.returncode == 0, done.stderr
    assert "1.66x" in done.stdout
    assert "DSI, SP=2: measured / ideal up to" in done.stdout


def test_bench_never_slower_on_a_corner_of_the_grid() -> None:
    words = ["--acceptances", "0,0.9", "--shares", "0.3", "--sp", "1,2", "--jitters", "0"]
    done = dsi_actors_command(
        "bench", "never-slower", *words, "--tokens", "10", "--repeats", "1", "--simulations", "10", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(row["acceptance"], row["sp"]) for row in rows] == [(0, 1), (0, 2), (0.9, 1), (0.9, 2)]
    for row in rows:
        assert row["simulated_ratio_to_ar"] <= 1.0001
        assert row["simulated_runs_slower_than_ar_with_enough_servers"] == 0
        for ratio, other in (("ratio_to_ar", "ar_ms_per_token"), ("ratio_to_best_si", "si_ms_per_token")):
            assert row[ratio] == pytest.approx(row["ms_per_token"] / row[other]), "of one repeat"
        assert row["ar_ms_per_token"] >= 20, "no forward is shorter than --target-ms"


@pytest.mark.parametrize(
    "measure", [[], pytest.param(["--measure", "--tokens", "5", "--repeats", "1"], marks=pytest.mark.long)]
)
def test_bench_heatmap_draws(tmp_path: Path, measure: list[str]) -> None:
    picture = tmp_path / "map.png"
    done = dsi_actors_command("bench", "heatmap", "--steps", "2", "--sp", "2", *measure, "--picture", picture)
    assert done.returncode == 0, done.stderr
    assert "DSI / min(AR, SI)" in done.stdout
    pixels = imread(picture)[:, :, :3]
    assert pixels.shape[:2] == (960, 1200)
    red, _, blue = (pixels[:, :, channel] for channel in range(3))
    square = red.size / 40  # less than one of a panel's four, more than the legend has of a colour
    assert ((blue - red) > 0.2).sum() > square, "somewhere DSI is faster"
    assert ((red - blue) > 0.2).sum() > square, "somewhere SI is slower than plain decoding"


def test_bench_heatmap_says_what_the_closed_forms_say() -> None:
    done = dsi_actors_command("bench", "heatmap", "--steps", "2", "--sp", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert [(row["acceptance"], row["drafter_share"]) for row in rows] == [(0, 0.5), (0, 1), (1, 0.5), (1, 1)]
    never, never_slow, always, always_slow = rows
    assert all(row["ar_ms_per_token"] == pytest.approx(20) for row in rows)
    assert never["dsi_ms_per_token"] == never_slow["dsi_ms_per_token"] == pytest.approx(20), "nothing is lost by drafts"
    assert never["si_ms_per_token"] == pytest.approx(20 + 10, rel=0.01)
    assert never_slow["si_ms_per_token"] == pytest.approx(20 + 20, rel=0.01)
    assert always["dsi_ms_per_token"] == pytest.approx(10, rel=0.02), "as fast as the drafter"
    assert always["dsi_ms_per_token"] < always["si_ms_per_token"]
    assert always_slow["dsi_ms_per_token"] == pytest.approx(20, rel=0.01)


def test_logprobs_are_the_targets_own(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    words: list[str | Path] = [
        "generate",
        PROMPT,
        "--target",
        model,
        "--gpu",
        "cpu",
        "--max-tokens",
        "20",
        "--json",
        "--logprobs",
    ]
    result = json.loads(dsi_actors_command(*words, *SAMPLED, "--json", "--logprobs").stdout)
    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    prompt_ids = [int(word[1:]) for word in PROMPT.split()]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt_ids + result["token_ids"]])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1].gather(1, torch.tensor(result["token_ids"])[:, None])
    assert result["logprobs"] == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


def test_the_terminal_shows_text_marks_and_table(model: Path) -> None:
    done = dsi_actors_command("generate", PROMPT, "--target", model, "--gpu", "cpu", "--max-tokens", "10", "--compare")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[●◆○]{10}$", done.stdout, re.MULTILINE)
    assert re.search(r"AR .*\n.* SI .*\n.* DSI ", done.stdout)
    assert "The three outputs are the same, token for token." in done.stdout


def test_three_shells(model: Path, tmp_path: Path) -> None:
    """An orchestrator that listens, and two workers that are told nothing but their device."""
    endpoint = f"ipc://{tmp_path}/dsi.sock"
    workers = [start_worker(endpoint, forked=False) for _ in range(2)]
    words = ["--listen", endpoint, "--lookahead", "2", "--max-tokens", "100", "--ignore-eos", "--wait", "600", "--json"]
    done = dsi_actors_in_a_shell("generate", PROMPT, "--target", model, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["tokens"], result["sp"]) == (100, 1)
    assert result["drafted_tokens"] > 0
    for worker in workers:
        worker.communicate(timeout=limit_s())
        assert worker.returncode == 0


@pytest.mark.parametrize("when", ["workers load", "workers work"])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, when: str) -> None:
    endless = make_tiny_model(tmp_path / "tiny", positions=16_384)
    running = subprocess.Popen(
        command("generate", PROMPT, "--target", endless, "--gpu", "cpu", "--sp", "2", "--max-length", "16000",
                "--max-tokens", "15000", "--ignore-eos"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )  # fmt: skip
    process = psutil.Process(running.pid)
    workers: list[int] = []
    while len(workers) < 3 and running.poll() is None:
        workers = [child.pid for child in process.children(recursive=True)]
    if when == "workers work":
        assert running.stdout is not None
        assert running.stdout.read(1), "the first token"
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=limit_s(60))
    wait_for_end(workers)
    assert running.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["generate", ""], "the prompt is empty: give some text"),
        (["generate", PROMPT, "--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["generate", PROMPT, "--max-tokens", "-5"], "max_tokens must be at least 1, not -5"),
        (["generate", PROMPT, "--sp", "0"], "sp must lie in [1, 1024], not 0"),
        (["generate", PROMPT, "--temperature", "-1"], "temperature must lie in [0, 1000], not -1.0"),
        (["generate", PROMPT, "--temperature", "nan"], "temperature must lie in [0, 1000], not nan"),
        (["generate", PROMPT, "--top-p", "0"], "top_p must lie in (0, 1], not 0.0"),
        (["generate", PROMPT, "--top-k", "-2"], "top_k must be at least 1 (leave it out to keep all tokens), not -2"),
        (["generate", PROMPT, "--seed", "-1"], "seed must lie in [0, 2**64), not -1"),
        (["generate", PROMPT, "--lookahead", "0"], "give auto or a whole number of at least 1"),
        (["generate", PROMPT, "--max-tokens", "5000"], "together 5008 are over the target's limit of 512"),
        (["generate", "w1 " * 600, "--max-tokens", "1"], "the prompt has 600 tokens"),
        (["generate", PROMPT, "--drafter", "none", "--drafter", "ngram"], "--drafter none goes with no other drafter"),
        (["generate", PROMPT, "--drafter", "ngram", "--drafter", "ngram"], "the same drafter is named twice"),
        (["generate", PROMPT, "--gpu", "nine"], "'nine' is no device"),
        (["generate", PROMPT, "--gpu", "7"], "there is no GPU 7"),
        (["generate", PROMPT, "--dtype", "float8"], "invalid choice: 'float8'"),
        (["generate", PROMPT, "--listen", "5555"], "listen '5555' is no endpoint"),
        (["generate", PROMPT, "--listen", "tcp://0.0.0.0:5555"], "can be reached by other machines"),
        (["generate", PROMPT, "--keys", "keys"], "keys are for workers that connect: give listen, too"),
        (
            ["generate", PROMPT, "--listen", "tcp://0.0.0.0:0", "--keys", "/nowhere"],
            "there is no /nowhere/orchestrator.key",
        ),
        (["generate", PROMPT, "--resume", "/nowhere"], "cannot read --resume /nowhere: No such file"),
        (["serve", "--port", "99999"], "--port must be a port"),
        (["serve", "--api-keys", "/nowhere"], "cannot read --api-keys /nowhere: No such file"),
        (["serve", "--max-queue", "0"], "max_generations must be at least 1"),
        (["generate", PROMPT, "--record", "/nowhere/x"], "cannot write --record /nowhere/x: No such file"),
        (["conformance", "5555"], "cannot listen on '5555' is no endpoint"),
        (["generate", PROMPT, "--drafter", "/nowhere/x.gguf"], "there is no file /nowhere/x.gguf"),
        (["generate", PROMPT, "--target", "package:no_such"], "no Python package 'no_such' is installed"),
        (["generate", PROMPT, "--target", "tests"], "is not a transformers model"),
        (["bench", "exact", "--prompts", "/nowhere"], "/nowhere cannot be read as lines of"),
        (["bench", "exact", "--prompts", "Makefile"], "Makefile cannot be read as lines of"),
        (
            ["bench", "exact-cost", "--prompts", "Makefile", "--repeats", "0"],
            "--repeats, --threads and --tp must be at least 1",
        ),
        (["generate", PROMPT, "--drafter", "ngram+ngram"], "ngram+ngram is no more than ngram"),
        (
            ["bench", "real", "--prompts", "Makefile", "--library", "int4"],
            "--library int4 is no dtype and number of threads",
        ),
        (["bench", "real", "--prompts", "Makefile", "--drafter", "ngram", "--layers", "9"], "--layers is for models"),
        (["bench", "acceptance", "--prompts", "Makefile", "--drafter", "ngram"], "'ngram' has no distribution"),
        (
            ["bench", "acceptance", "--prompts", "Makefile", "--temperatures", "1,-1"],
            "-1 is not a number of at least 0",
        ),
        (["simulate", "--target-ms", "-1"], "--target-ms must be a number of at least 0, not -1"),
        (["simulate", "--target-ms", "nan"], "--target-ms must be a number of at least 0, not nan"),
        (["simulate", "--acceptance", "1.5"], "--acceptance must lie in [0, 1], not 1.5"),
        (["simulate", "--sp", "0"], "--sp must be at least 1, not 0"),
        (["simulate", "--cancel-ms", "-1"], "--cancel-ms must be at least 0"),
        (["simulate", "--trace", "Makefile"], "Makefile cannot be read as a trace"),
        (["bench", "timed", "--sp", "1000"], "more than 64 devices for one request make no sense"),
        (["bench", "table2", "--sp", "0,1"], "each must lie in [1, 64]"),
        (["bench", "table2", "--sp", "x"], "--sp 'x' is no list of numbers"),
        (["bench", "table2", "--pairs", "2", "--skip", "2"], "--skip must be at least 0, and leave a pair"),
        (["bench", "never-slower", "--acceptances", "2"], "--acceptances 2: each must lie in [0, 1]"),
        ([*PLAN, "--gpus", "1"], "at least 2"),
        ([*PLAN, "--target-ms", "tp2=x"], "'tp2=x' is neither milliseconds nor tpN=milliseconds"),
        ([*PLAN, "--target-ms", "tp1=10"], "--target-ms: the same number of GPUs is given twice"),
        ([*PLAN, "--target-ms", "tp2=0"], "--target-ms must be above 0"),
        ([*PLAN, "--clients", "0"], "--clients must be at least 1, not 0"),
        ([*PLAN, "--position-ms", "-1"], "--position-ms must be a number of at least 0, not -1"),
        (["plan", "--target-ms", "tp4=9", *PLAN[3:], "--gpus", "3"], "a target server of 4 GPUs is more than --gpus 3"),
        ([*PLAN, "--gpus", "1000"], "more than 64 devices for one request make no sense"),
        ([*PLAN, "--picture", "plan.txt"], "the name must end with .png, .svg, .pdf"),
        ([*PLAN, "--window-ms", "1"], "--window-ms must be at least --target-ms"),
        (["bench", "overhead", "--repeats", "0"], "--repeats, --cancels, --tokens and --long must be at least 1"),
        (["bench", "overhead", "--target-ms", "-1"], "latency_ms"),
    ],
)
def test_bad_input_gets_one_clear_sentence(
    model: Path, arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    words = list(arguments)
    if words[0] == "generate" and "--target" not in words:
        words += ["--target", str(model)]
    if words[0] == "generate" and "--gpu" not in words:
        words += ["--gpu", "cpu"]
    done = dsi_actors_command(*words)
    assert done.returncode not in (0, 130)
    assert problem in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_in_use(model: Path, tmp_path: Path) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        done = dsi_actors_command("generate", PROMPT, "--target", model, "--listen", f"tcp://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "another process listens there: choose another port" in done.stderr


def test_bench_overhead_reports_its_machine_and_three_figures() -> None:
    done = dsi_actors_command(
        "bench", "overhead", "--repeats", "50", "--cancels", "10", "--tokens", "40", "--target-ms", "3",
        "--drafter-ms", "1", "--long", "300", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["machine"]["cores"] == cores()
    measured = [row["measured"] for row in result["results"]]
    assert measured[:3] == ["round trip", "orchestrator CPU", "ZeroMQ and msgpack alone"]
    assert measured[3] == "cancel to free (timed)"
    assert sum(name.startswith("memory of ") for name in measured) == 3
    assert measured[-1] == "a generation of 300 tokens"
    assert 0 < result["results"][0]["p50_us"] <= result["results"][0]["p99_us"]


def test_bench_load_finds_every_text_alike() -> None:
    arguments = ["--clients", "1,5", "--seconds", "1", "--tokens", "12", "--target-ms", "12", "--drafter-ms", "2"]
    result = dsi_actors_command(
        "bench", "load", *arguments, "--position-ms", "0.05", "--one-device", "--sp", "1", "--json"
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [(row["clients"], row["algorithm"]) for row in rows] == [(1, "dsi"), (1, "ar"), (5, "dsi"), (5, "ar")]
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        assert ours["of_plain"] == pytest.approx(ours["tokens_per_s"] / plain["tokens_per_s"])
    assert all(row["differing"] == 0 and row["generations"] >= row["clients"] for row in rows)


def test_bench_scale_tells_what_fills_a_core() -> None:
    words = ["--workers", "2,3", "--seconds", "0.5", "--tokens", "8", "--target-ms", "8", "--drafter-ms", "2", "--json"]
    result = dsi_actors_command("bench", "scale", *words)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [(row["workers"], row["clients"], row["sp"]) for row in rows] == [(2, 1, 1), (3, 2, 2)]
    for row in rows:
        assert row["tokens_per_s"] * row["messages_per_token"] == pytest.approx(row["messages_per_s"])
        assert row["messages_per_token"] > 1 / 8
        assert row["tokens_per_s"] == pytest.approx(
            row["orchestrator_share_of_a_core"] * row["tokens_per_s_that_fill_a_core"]
        )


@pytest.mark.long
def test_bench_real_holds_ours_beside_the_library(model: Path, prompts: Path) -> None:
    result = dsi_actors_command(
        "bench", "real", "--target", model, "--prompts", prompts, "--limit", "2", "--max-tokens", "6", "--gpu", "cpu",
        "--library", "float32:1", "--drafter", "self-int8", "--drafter", "ngram+self-int8", "--choose", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {row["way"]: row for row in json.loads(result.stdout)["results"]}
    assert list(rows) == [
        "float32, 1 threads: generate", "float32, 1 threads: assisted, same drafter",
        "float32, 1 threads: assisted, prompt lookup", "ours: AR", "ours: SI self-int8", "ours: DSI self-int8",
        "ours: SI ngram+self-int8", "ours: DSI ngram+self-int8", "ours: DSI self-int8 or ngram+self-int8",
    ]  # fmt: skip
    for way, row in rows.items():
        assert row["differing"] == 0
        assert row["ms_per_token_q1"] <= row["ms_per_token"] <= row["ms_per_token_q3"]
        assert (row["prompts"], row["tokens"]) == (2, 12)
        if "SI" in way and "DSI" not in way:
            assert 0 <= row["acceptance_rate"] <= 1, "it drafts"
    assert rows["ours: AR"]["acceptance_rate"] is None
    assert all(rows[way]["other_text_than_our_plain_decoding"] == 0 for way in rows), "no two of its logits are near"


def test_generate_takes_one_of_several_drafters_or_both(model: Path) -> None:
    done = dsi_actors_command(
        "generate", PROMPT, "--target", model, "--gpu", "cpu", "--drafter", "ngram", "--drafter", "self-int8",
        "--max-tokens", "120", "--ignore-eos", "--compare", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["identical"] is True
    ar, si, dsi = result["results"]
    assert (ar["drafter"], ar["drafted_tokens"]) == ("", 0)
    drafters = ("ngram", "self-int8", "self-int8 & ngram")
    assert si["drafter"] in drafters
    for row in (si, dsi):  # DSI may find that plain decoding is faster, and then drafts nothing
        assert (row["drafter"] in drafters) == (row["drafted_tokens"] > 0)
    assert si["drafted_tokens"] > 0


def test_bench_http_finds_every_text_alike() -> None:
    arguments = ["--clients", "1,4", "--repeats", "1", "--tokens", "12", "--target-ms", "6", "--drafter-ms", "2"]
    result = dsi_actors_command("bench", "http", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [row["clients"] for row in rows] == [1, 4]
    for row in rows:
        assert row["differing"] == 0
        assert row["lowest_ratio"] <= row["ratio"] <= row["highest_ratio"]
        assert row["ratio"] == pytest.approx(row["http_ms_per_token"] / row["ms_per_token"]), "of one repeat"
        assert min(row["first_token_ms"], row["http_first_token_ms"]) >= 6, "no forward is shorter than --target-ms"


@pytest.mark.long
def test_bench_soak_finds_nothing_that_grows() -> None:
    result = dsi_actors_command("bench", "soak", "--minutes", "0.12", "--clients", "8", "--json")
    assert result.returncode == 0, result.stderr
    [row] = json.loads(result.stdout)["results"]
    assert row["finished"] + row["vanished"] > 0
    last = row["last"]
    assert min(last["private_bytes"], last["workers_private_bytes"]) > 1 << 20, "nothing grows that is not measured"
    assert min(last["descriptors"], last["tasks"]) > 2
    assert row["differing"] == row["left_running"] == 0
    assert row["worker_idle_share"] < 0.05
