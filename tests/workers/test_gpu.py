"""What runs on a GPU computes what the decoder computes, and gives the same bits however tokens are grouped.

Without a GPU the kernels run in Triton's interpreter, in float32, and parts of a forward as they are instead of as graphs. On
one they run as they would in a worker, in bfloat16.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels for a GPU need Triton")

from dsi_protocol import OptionValue
from dsi_protocol.gumbel import stream_key
from dsi_workers.backend import Run
from dsi_workers.checkpoints.load import load_model, with_gpu_kernels
from dsi_workers.checkpoints.sizes import buffer_bytes
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import Forward
from dsi_workers.decoding.gpu.decoder import GpuDecoder
from dsi_workers.decoding.gpu.linear import GpuLinear
from dsi_workers.decoding.packed import PackedBatch, Segment
from dsi_workers.decoding.quantization import Int8Linear
from dsi_workers.decoding.torch_backend import TorchBackend
from dsi_workers.decoding.widths import Trial, Widths
from dsi_workers.engine import Interrupted
from dsi_workers.engines import Task, load_engine
from dsi_workers.engines.model import ModelEngine
from dsi_workers.sampling import gumbel_noise
from dsi_workers.tree import Branch
from support.engines import InterruptAfter, NoInterrupt, make_tiny_model, session_of, torch_backend

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
#: Of the norm of what is compared.
NEAR = 0.03 if GPU else 1e-5
DIM, HIDDEN, INNER, WORDS, LAYERS = 16, 48, 96, 80, 2
#: In the interpreter a kernel takes as long as it has programs, and there is one for each row and head.
KV_HEADS = 1
WINDOW = 8
CAPACITY = 256
LONG = pytest.mark.long
SLIDES = 12


def random_tensor(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(DEVICE, DTYPE)


def decoder(
    *, kv_heads: int = KV_HEADS, slides: bool = False, norms: bool = False, biases: bool = False, layers: int = LAYERS
) -> tuple[Decoder, Any]:
    heads = 2 * kv_heads
    config: Any = SimpleNamespace(
        rms_norm_eps=1e-5, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=DIM, hidden_size=HIDDEN,
    )  # fmt: skip
    if slides:
        config.sliding_window, config.layer_types = SLIDES, ["sliding_attention", "full_attention"]
    shapes = {
        "self_attn.q_proj": (heads * DIM, HIDDEN), "self_attn.k_proj": (kv_heads * DIM, HIDDEN),
        "self_attn.v_proj": (kv_heads * DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, heads * DIM),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    weights = {
        "model.embed_tokens.weight": random_tensor(WORDS, HIDDEN, seed=1),
        "lm_head.weight": random_tensor(WORDS, HIDDEN, seed=2, scale=0.3),
        "model.norm.weight": random_tensor(HIDDEN, seed=3).abs(),
    }
    for layer in range(layers):
        name, seed = f"model.layers.{layer}", 100 * layer
        for place, (part, shape) in enumerate(shapes.items()):
            weights[f"{name}.{part}.weight"] = random_tensor(*shape, seed=seed + place, scale=shape[1] ** -0.5)
            if biases:
                weights[f"{name}.{part}.bias"] = random_tensor(shape[0], seed=seed + 20 + place)
        for place, part in enumerate(("input_layernorm", "post_attention_layernorm")):
            weights[f"{name}.{part}.weight"] = random_tensor(HIDDEN, seed=seed + 40 + place).abs()
        if norms:
            for place, part in enumerate(("q_norm", "k_norm")):
                weights[f"{name}.self_attn.{part}.weight"] = random_tensor(DIM, seed=seed + 60 + place).abs()
    angles = torch.outer(torch.arange(CAPACITY), 5e5 ** -torch.linspace(0, 1, DIM // 2))
    angles = torch.cat((angles, angles), dim=-1)
    return Decoder(weights, config, angles.cos().to(DTYPE), angles.sin().to(DTYPE)), config


def forwards(**more: Any) -> tuple[Forward, Forward]:
    """By kernels, and by torch's own operations."""
    own, config = decoder(**more)
    by_kernels = GpuDecoder(own)
    first, second = (Forward(each, config, DEVICE, slots=3, capacity=CAPACITY) for each in (by_kernels, own))
    return first, second


def tokens_of(slot: int, begin: int, count: int) -> list[int]:
    return [(13 * slot + 7 * place) % WORDS for place in range(begin, begin + count)]


def run_of(slot: int, begin: int, count: int, width: int = WINDOW) -> Run:
    return Run(slot, tokens_of(slot, begin, count), begin, width, begin)


def logits_of(forward: Forward, runs: Sequence[Run]) -> list[torch.Tensor]:
    rows = sum(run.width for run in runs)
    return forward(runs, rows=rows, logit_rows=rows)


def read(forward: Forward, slot: int, positions: int) -> None:
    """A prompt: wider than a run of the kernels."""
    logits_of(forward, [run_of(slot, 0, positions, positions)])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.float() - expected.float()).norm() <= NEAR * expected.float().norm()


@pytest.mark.parametrize(
    "more",
    [
        {"kv_heads": 2, "layers": 1},
        pytest.param({"slides": True}, marks=LONG),
        pytest.param({"norms": True, "biases": True}, marks=LONG),
    ],
)
def test_logits_are_the_decoders(more: dict[str, Any]) -> None:
    """One generation and several, prompts between, windows that are full and not, on both sides of where attention is cut."""
    by_kernels, plain = forwards(**more)
    chance = random.Random(3)
    lengths = [0, 0, 0]
    for turn in range(4):
        if turn == 2:
            for forward in (by_kernels, plain):
                read(forward, 0, 123)
            lengths[0] = 123
        slots = chance.sample(range(3), 1 + turn % 3)
        runs = [run_of(slot, lengths[slot], chance.randrange(1, WINDOW + 1)) for slot in slots]
        for ours, theirs in zip(logits_of(by_kernels, runs), logits_of(plain, runs), strict=True):
            assert_near(ours, theirs)
        for run in runs:
            lengths[run.slot] += len(run.tokens)


def others(rows: int) -> list[Run]:
    """Runs of 1 to 8 rows of slots 1 and 2, so many rows in all."""
    chance, found, begins = random.Random(rows), list[Run](), [0, 30, 0]
    while (left := rows - sum(run.width for run in found)) > 0:
        slot, count = chance.choice((1, 2)), min(left, chance.choice((1, 2, 4, 8)))
        found.append(run_of(slot, begins[slot], count, width=count))
        begins[slot] += count
    return found


@LONG
def test_a_token_has_the_same_bits_in_groups_of_any_size() -> None:
    """Each row attends by itself, or with others of its generation."""
    by_kernels, _ = forwards(slides=True)
    length = 124  # attention is cut at 128
    read(by_kernels, 0, length)
    [expected] = logits_of(by_kernels, [run_of(0, length, WINDOW)])
    for size in (1, 2, 4):
        runs = [run_of(0, length + begin, size, width=size) for begin in range(0, WINDOW, size)]
        assert torch.equal(torch.cat(logits_of(by_kernels, runs)), expected), size
    several = [run_of(0, length, 5, width=5), run_of(0, length + 5, 3, width=3)]
    assert torch.equal(torch.cat(logits_of(by_kernels, several)), expected)


@LONG
@pytest.mark.parametrize("rows", [50, 70, 256])
def test_a_token_has_the_same_bits_in_batches_of_any_size(rows: int) -> None:
    """In one block of products and in several. The tokens of one generation attend in groups of 1, 3 and 4 rows."""
    by_kernels, _ = forwards(layers=1)
    length = 124
    read(by_kernels, 0, length)
    [expected] = logits_of(by_kernels, [run_of(0, length, WINDOW)])
    beside = others(rows - WINDOW)
    before = random.Random(rows).randrange(len(beside) + 1)
    own = [run_of(0, length, 4, width=4), run_of(0, length + 4, 1, width=1), run_of(0, length + 5, 3, width=3)]
    found = logits_of(by_kernels, [*beside[:before], *own, *beside[before:]])
    assert torch.equal(torch.cat(found[before : before + 3]), expected)


def test_a_batch_wider_than_any_recording_is_refused() -> None:
    """Torch's own operations would give its rows other bits."""
    by_kernels, _ = forwards()
    with pytest.raises(AssertionError, match="different bits"):
        logits_of(by_kernels, [run_of(1, 0, 1, width=1)] * 257)


def test_a_token_has_the_same_bits_in_any_window_and_any_batch() -> None:
    by_kernels, _ = forwards(layers=1)
    length = 126  # attention is cut at 128
    for slot in range(2):
        read(by_kernels, slot, length)
    [alone] = logits_of(by_kernels, [run_of(0, length, WINDOW)])
    for begin, count in ((length, 1), (length + 1, 3), (length + 4, 4)):
        [logits] = logits_of(by_kernels, [run_of(0, begin, count, width=count)])
        assert torch.equal(logits, alone[begin - length :][:count]), (begin, count)
    for others in (1, 2, 3):
        runs = [run_of(1, 30 + 8 * place, WINDOW) for place in range(others)]
        assert torch.equal(logits_of(by_kernels, [*runs, run_of(0, length, WINDOW)])[-1], alone)
    _, second = logits_of(by_kernels, [run_of(1, 30, 5), run_of(0, length, WINDOW)])
    assert torch.equal(second, alone)


def branch_runs(fork: int, count: int, width: int) -> list[Run]:
    """A branch of slot 0 with other tokens, in runs of `width` rows."""
    tokens = [(11 * place + fork) % WORDS for place in range(count)]
    return [
        Run(0, tokens[begin : begin + width], fork + begin, width, fork + begin, fork)
        for begin in range(0, count, width)
    ]


@LONG
@pytest.mark.parametrize("more", [{"layers": 1}, {"slides": True, "kv_heads": 2}])
def test_a_token_on_a_branch_has_the_bits_that_it_has_in_a_chain(more: dict[str, Any]) -> None:
    """Branches that begin on both sides of where attention is cut, of one window and of several, in groups of 1 to 8 rows, with
    another generation's rows between. Afterwards the main path goes on as if there were none."""
    by_kernels, _ = forwards(**more)
    length = 124  # attention is cut at 128
    read(by_kernels, 0, length)
    read(by_kernels, 1, 20)
    main = run_of(0, length, WINDOW)
    after = run_of(0, length + WINDOW, 4)
    branches = [
        branch_runs(*shape) for shape in ((125, 5, 5), (128, 2, 2), (130, 3, WINDOW), (125, 19, WINDOW), (126, 2, 1))
    ]
    [expected_main], [expected_after] = logits_of(by_kernels, [main]), logits_of(by_kernels, [after])
    expected = []
    for runs in branches:
        logits_of(by_kernels, [main])
        expected.append(torch.cat([logits_of(by_kernels, [replace(run, fork=None)])[0] for run in runs]))
    logits_of(by_kernels, [main])
    for chosen in ((0, 1, 2, 4), (3,)):
        other = run_of(1, 20, 3, width=3)
        together = [main, *(run for number in chosen for run in branches[number]), other]
        found = logits_of(by_kernels, together)
        assert torch.equal(found.pop(0), expected_main)
        for number in chosen:
            parts = [found.pop(0) for _ in branches[number]]
            assert torch.equal(torch.cat(parts), expected[number]), (chosen, number)
        assert torch.equal(logits_of(by_kernels, [after])[0], expected_after)
    alone = torch.cat(logits_of(by_kernels, branches[3]))
    assert torch.equal(alone, expected[3]), "without the main path, which is there already"


@torch.inference_mode()
def test_what_is_beyond_a_text_is_neither_read_nor_written() -> None:
    by_kernels, _ = forwards(layers=1)
    read(by_kernels, 0, 40)
    [expected] = logits_of(by_kernels, [run_of(0, 40, 3, width=3)])
    like = torch.empty(1, KV_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)
    for layer in by_kernels.cache.layers:
        for tensor in layer.tensors(like, like):
            tensor[0, :, 43:], tensor[1:] = 1e4, 1e4
    [logits] = logits_of(by_kernels, [run_of(0, 40, 3, width=3)])
    assert torch.equal(logits, expected)
    for layer in by_kernels.cache.layers:
        for tensor in layer.tensors(like, like):
            assert (tensor[0, :, 43:] == 1e4).all()
            assert (tensor[1:] == 1e4).all()


def engine_on_a_gpu(monkeypatch: pytest.MonkeyPatch, directory: Path, role: str, **options: OptionValue) -> ModelEngine:
    """Loaded and warmed up as on a GPU, to see what shares a forward. Without one all widths count as tried, and the decoder
    that kernels stand for computes: the interpreter would take minutes."""
    if not GPU:

        def load_by_kernels(*arguments: Any, **more: Any) -> Any:
            found = load_model(*arguments, **{**more, "kernels": False})
            assert isinstance(found.decoder, Decoder)
            return replace(found, decoder=with_gpu_kernels(found.decoder, prompt_chunk=128))  # else minutes, too

        def widths(trial: Trial, slots: int) -> Widths:
            return Widths({rows: 1.0 for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)})

        def compute(self: Any, between: Any, packed: Any) -> torch.Tensor:
            logits: torch.Tensor = self._decoder(packed, self.cache, between)
            return logits

        def run(self: Any, between: Any) -> None:
            """From the inputs in the device's memory: one row of each generation."""
            live = [row for row, position in enumerate(self.positions.tolist()) if position >= 0]
            ids, positions, slots = (each[: len(live)].tolist() for each in (self.ids, self.positions, self._slots))
            self.cache.segments = segments = [
                Segment(slot, position, 1, self.cache.capacity) for slot, position in zip(slots, positions, strict=True)
            ]
            packed = PackedBatch(ids, positions, segments, live, live)
            self.logits[: len(live)] = self._decoder(packed, self.cache, between)

        monkeypatch.setattr("dsi_workers.decoding.gpu.recording.Recording.record", lambda self, capture: None)
        monkeypatch.setattr("dsi_workers.decoding.gpu.recording.Recording.compute", compute)
        monkeypatch.setattr("dsi_workers.decoding.gpu.recording.Recording.run", run)
        monkeypatch.setenv("DSI_CACHE", str(directory))
        monkeypatch.setattr("dsi_workers.checkpoints.load.pack", lambda linear, rows: linear)
        monkeypatch.setattr("dsi_workers.group.loading.load_model", load_by_kernels)
        monkeypatch.setattr(Trial, "widths", widths)
    options = {"window": 16, "quantization": "none", "max_length": 256, **options}
    model = str(make_tiny_model(directory / "model"))
    engine = load_engine("transformers", role=role, model=model, device=str(DEVICE), options=options)
    assert isinstance(engine, ModelEngine)
    assert torch_backend(engine).forward.recorded_rows == GpuDecoder.recorded_rows
    return engine


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many generations share each forward."""
    found: list[int] = []
    compute = GpuDecoder.__call__

    def counted(self: GpuDecoder, packed: Any, cache: Any, between_layers: Any) -> torch.Tensor:
        found.append(len(packed.segments))
        return compute(self, packed, cache, between_layers)

    monkeypatch.setattr(GpuDecoder, "__call__", counted)
    return found


@pytest.mark.parametrize(("role", "unread"), [("target", (16,) * 17 + (1,) * 3), ("drafter", (0,) * 258)])
def test_generations_share_no_forward_that_is_too_wide_for_the_kernels(
    role: str, unread: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[int]
) -> None:
    engine = engine_on_a_gpu(monkeypatch, tmp_path, role, slots=len(unread), calibrate=False)
    del shared[:]
    sessions = [session_of([5, *range(10, 10 + more)], prompt_length=1, generation=n) for n, more in enumerate(unread)]
    tasks = [Task(session, len(session.tokens), None if role == "target" else 1) for session in sessions]
    while left := [task for task in tasks if not task.done]:
        engine.step(left, NoInterrupt())
    assert sum(shared) >= len(tasks)
    assert max(shared) >= 16


def test_a_tree_with_more_branches_than_a_forward_has_rows_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[int]
) -> None:
    """Those that do not fit wait until the answer goes along one of them."""
    engine = engine_on_a_gpu(monkeypatch, tmp_path, "target", slots=3, calibrate=False)
    rows = engine.info.rows  # a GPU tries no more windows than three generations need
    assert rows == (64 if GPU else 256)
    session, others = (
        session_of([5, 6], prompt_length=1),
        [session_of([5], generation=2), session_of([5], generation=3)],
    )
    own = list[int]()
    for _ in range(6):
        own += engine.verify(session, len(session.tokens), NoInterrupt()).tokens
        session.write(len(session.tokens), own[-1:])
    session.truncate(2)
    session.write(2, [*own[:3], (own[3] + 1) % WORDS])
    wrong = [Branch(2 + number % 4, None, [(own[number % 4] + 2 + number // 4) % WORDS, 1, 2]) for number in range(90)]
    tree = Task(session, 2, branches=[*wrong, Branch(5, None, own[3:5])])
    tasks = [tree, *(Task(other, 1) for other in others)]
    del shared[:]
    while left := [task for task in tasks if not task.done]:
        engine.step(left, NoInterrupt())
    assert tree.answer.tokens == own
    if GPU:  # the fastest of several widths, which take equally long
        assert 1 < max(shared) < len(wrong)
    else:
        assert max(shared) == 1 + (rows - 8) // 4, "8 rows of the main path, and 4 of each branch"


@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("slots", [1, *(pytest.param(slots, marks=LONG) for slots in (8, 16, 33))])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_worker_starts_and_serves_whatever_its_slots(
    role: str, slots: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[int]
) -> None:
    engine = engine_on_a_gpu(monkeypatch, tmp_path, role, slots=slots, window=window)
    assert engine.info.latency_us > 0
    assert engine.info.batch_latency_us > 0
    sessions = [session_of([5], generation=number) for number in range(slots)]
    for length in (1, 2):
        del shared[:]
        tasks = [Task(session, length, None if role == "target" else 1) for session in sessions]
        engine.step(tasks, NoInterrupt())
        assert all(task.done for task in tasks)
        for session, task in zip(sessions, tasks, strict=True):
            session.write(length, task.answer.tokens)
    assert shared == [slots], "one row each"
    assert len({tuple(task.answer.tokens) for task in tasks}) == 1


def test_a_drafter_that_lost_a_long_text_reads_it_before_its_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: list[int]
) -> None:
    """The text and the branches together have more rows than the kernels compute."""
    engine = engine_on_a_gpu(monkeypatch, tmp_path, "drafter", slots=1, max_length=512, calibrate=False)
    torch_backend(engine).prompt_chunk = 512
    text = [(7 * place) % 90 for place in range(300)]
    session, other = session_of(text), session_of([5], generation=2)
    session.drafts.restart(session.tokens, len(text))

    def draft() -> Task:
        task = Task(session, len(session.tokens), 9, session.drafts.branches[:7], alternatives=True)
        while not task.done:
            engine.step([task], NoInterrupt())
        answer = task.answer
        session.drafts.add(task.start, answer.tokens, answer.alternatives, task.branches, answer.continued)
        session.write(task.start, answer.tokens)
        return task

    while len(session.drafts.branches) < 7:
        draft()
    engine.draft(other, 1, NoInterrupt())
    assert session.computed == 0, "the other generation has the slot"
    del shared[:]
    assert None not in draft().answer.continued
    assert shared == [1, 1 + 7]


@pytest.mark.parametrize("checks", [1, 2])
def test_an_interrupt_takes_effect_within_a_forward_and_leaves_no_trace(
    checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsi_workers.decoding.gpu.recording._LAYERS", 1)
    by_kernels, _ = forwards()
    [expected] = logits_of(by_kernels, [run_of(0, 0, 3)])
    by_kernels.interrupt = InterruptAfter(checks)
    with pytest.raises(Interrupted):
        logits_of(by_kernels, [run_of(0, 0, 8)])
    by_kernels.interrupt = InterruptAfter(1 << 30)
    assert torch.equal(logits_of(by_kernels, [run_of(0, 0, 3)])[0], expected)


@LONG
def test_a_cache_of_its_own_gets_a_recording_of_its_own() -> None:
    own, config = decoder(layers=1)
    shared = GpuDecoder(own)
    first, second = (Forward(shared, config, DEVICE, slots=2, capacity=CAPACITY) for _ in range(2))
    logits_of(first, [run_of(0, 0, 8)])
    logits_of(second, [run_of(1, 0, 8)])
    [expected] = logits_of(first, [run_of(0, 8, 4)])
    logits_of(second, [run_of(1, 8, 4)])
    assert torch.equal(logits_of(first, [run_of(0, 8, 4)])[0], expected)
    assert not torch.equal(logits_of(second, [run_of(0, 8, 4)])[0], expected), (
        "another text came before, in the other cache"
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outputs", [80, 1600])
@pytest.mark.parametrize("rows", [11, pytest.param(150, marks=LONG)])
def test_products_are_the_layers(gated: bool, outputs: int, rows: int) -> None:
    """Widths that no block divides, rows that fill no block, or more than one."""
    linear = torch.nn.Linear(200, outputs, device=DEVICE, dtype=DTYPE)
    x = random_tensor(rows, 200, seed=5)
    expected = linear(x.float().to(DTYPE))
    if gated:
        gate, up = expected.float().chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    with torch.inference_mode():
        assert_near(GpuLinear(linear, gated=gated)(x), expected)


def test_int8_weights_are_scaled_back() -> None:
    linear = torch.nn.Linear(72, 48, device=DEVICE, dtype=DTYPE)
    int8 = Int8Linear(linear)
    if not GPU:  # the interpreter does not multiply bfloat16
        int8.scale, int8.bias = int8.scale.float(), linear.bias.detach()
    x = random_tensor(5, 72, seed=6)
    with torch.inference_mode():
        expected = x.float() @ (int8.weight.float() * int8.scale.float()[:, None]).T + linear.bias.float()
        assert_near(GpuLinear(int8)(x), expected)


@LONG
def test_the_buffers_are_as_large_as_is_counted() -> None:
    made, config = decoder(kv_heads=2)
    by_kernels = GpuDecoder(made)
    forward = Forward(by_kernels, config, DEVICE, slots=1, capacity=600)
    logits_of(forward, [run_of(0, 0, 1)])
    assert by_kernels._buffers is not None
    tensors = [each for each in vars(by_kernels._buffers).values() if isinstance(each, torch.Tensor)]
    counted = {**vars(config), "intermediate_size": INNER, "vocab_size": WORDS, "num_key_value_heads": 2}
    rope = 2 * forward.cache.capacity * DIM * DTYPE.itemsize
    found = buffer_bytes(counted, positions=forward.cache.capacity, number_bytes=DTYPE.itemsize)
    assert found - rope == sum(each.nbytes for each in tensors)


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_noise_has_the_same_bits_on_a_gpu() -> None:
    tokens = torch.arange(50_000)
    for position in range(3):
        key = stream_key(7, position)
        assert torch.equal(gumbel_noise(key, tokens.to(DEVICE)).cpu(), gumbel_noise(key, tokens))


@LONG
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Also where there is none: the interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "support.compile_kernels"], cwd=tests, env=environment, check=True)


@LONG
def test_a_drafter_s_branches_share_a_recorded_forward() -> None:
    """Each has a group of rows and a slot of its own, and goes on as a chain would."""
    made, config = decoder()
    forward = Forward(GpuDecoder(made), config, DEVICE, slots=2 + 4, capacity=CAPACITY)
    backend = TorchBackend(
        forward, None, vocabulary="", vocabulary_size=WORDS, max_length=128, window=WINDOW, branch_slots=4
    )
    engine = ModelEngine(backend, exact=False, calibrate=False)
    assert engine.info.rows == 3
    drafted, alone = session_of([3, 1, 4], generation=1), session_of([3, 1, 4], generation=2)
    drafted.drafts.restart(drafted.tokens, 3)
    for _ in range(3):
        task = Task(drafted, len(drafted.tokens), 9, drafted.drafts.branches[:2], alternatives=True)
        engine.step([task], NoInterrupt())
        answer = task.answer
        drafted.drafts.add(task.start, answer.tokens, answer.alternatives, task.branches, answer.continued)
        drafted.write(task.start, answer.tokens)
    assert engine.forwards == 3
    first, second, _ = drafted.drafts.branches
    for begin, path in (
        (3, drafted.tokens), (4, [3, 1, 4, *first.tokens]), (5, [*drafted.tokens[:4], *second.tokens]),
    ):  # fmt: skip
        alone.write(0, path[:begin])
        alone.truncate(begin)
        while len(alone.tokens) < len(path):
            alone.write(len(alone.tokens), engine.draft(alone, 1, NoInterrupt()))
        assert alone.tokens == path
