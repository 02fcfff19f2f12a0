"""Our own layers compute what the library's layers compute, and models that they do not know stay with the library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dsi_workers.backend import Run
from dsi_workers.checkpoints.checkpoint import read_checkpoint
from dsi_workers.checkpoints.library import TransformersDecoder
from dsi_workers.checkpoints.load import load_model
from dsi_workers.decoding.cpu.decoder import CpuDecoder
from dsi_workers.decoding.decoder import Decoder
from dsi_workers.decoding.forward import ComputesLogits, Forward
from dsi_workers.decoding.quantization import quantize_int8
from dsi_workers.models.files import ModelError

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TOKENS = [7 * place % 90 for place in range(40)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
#: Kind, its settings, and whether it is read without the library.
KINDS: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}, True),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, True),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}, False),
    ("mistral", {"sliding_window": None}, True),
    ("mistral", {"sliding_window": 8}, False),
    ("qwen2", {}, True),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
    ("qwen3", {"head_dim": 32}, True),
]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def made(directory: Path, kind: str, **more: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SHAPE, **more})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    model.eval().save_pretrained(directory)
    return model


def loaded(directory: Path, **more: Any) -> tuple[ComputesLogits, Any]:
    options: dict[str, Any] = {"dtype": "float32", "quantization": "none", "kernels": False, **more}
    found = load_model(directory, torch.device("cpu"), reference="made", rows=8, most_positions=256, **options)
    return found.decoder, found.config


def logits_of(decoder: ComputesLogits, config: Any, *, read_step: int = 512) -> torch.Tensor:
    """After each of TOKENS, read by pieces of different width, another generation's rows among them."""
    forward = Forward(decoder, config, torch.device("cpu"), slots=2, capacity=64)
    forward.read_step = read_step
    found, begin = [], 0
    for width in (7, 1, 1, 8, 20, 1, 1, 1):
        own = Run(0, TOKENS[begin : begin + width], begin, width, begin)
        other = Run(1, [5] * width, begin, width, begin)
        found.append(forward([own, other], rows=2 * width + 1, logit_rows=0)[0])
        begin += width
    return torch.cat(found)


@pytest.mark.parametrize(("kind", "more", "without_library"), KINDS)
@torch.inference_mode()
def test_logits_are_the_librarys(
    kind: str, more: dict[str, Any], without_library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tmp_path, kind, **more)
    expected = model(torch.tensor([TOKENS])).logits[0]
    if without_library:
        monkeypatch.setattr("dsi_workers.checkpoints.load._load_with_transformers", None)
    else:
        assert read_checkpoint(tmp_path, torch.float32, torch.device("cpu"), "made") is None
    decoder, config = loaded(tmp_path)
    assert isinstance(decoder, Decoder)
    torch.testing.assert_close(logits_of(decoder, config), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits_of(decoder, config, read_step=1), expected, rtol=1e-3, atol=1e-3)
    by_kernels, config = loaded(tmp_path, kernels=True)
    assert isinstance(by_kernels, CpuDecoder)
    torch.testing.assert_close(logits_of(by_kernels, config), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "more"), [("gemma", {"head_dim": 8}), ("stablelm", {})])
@torch.inference_mode()
def test_other_kinds_stay_with_the_library(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = made(tmp_path, kind, **more)
    decoder, config = loaded(tmp_path)
    assert isinstance(decoder, TransformersDecoder)
    expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits_of(decoder, config), expected, rtol=1e-3, atol=1e-3)


def test_a_model_whose_logits_come_out_otherwise_stays_with_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, "mistral", sliding_window=8)
    assert isinstance(loaded(tmp_path)[0], Decoder)
    monkeypatch.setattr("dsi_workers.decoding.decoder.rms_norm", lambda x, weight, epsilon: x * weight)
    assert isinstance(loaded(tmp_path)[0], TransformersDecoder)


@pytest.mark.parametrize(("kind", "kernels"), [("llama", False), ("llama", True), ("stablelm", False)])
@torch.inference_mode()
def test_int8_is_near(kind: str, kernels: bool, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    expected = model(torch.tensor([TOKENS])).logits[0]
    decoder, config = loaded(tmp_path, quantization="int8", kernels=kernels)
    found = logits_of(decoder, config, read_step=1)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_the_library_is_not_imported_for_a_model_that_does_not_need_it(tmp_path: Path) -> None:
    made(tmp_path, "llama")
    program = (
        "import sys; from pathlib import Path; import torch; from dsi_workers.checkpoints.load import load_model\n"
        f"load_model(Path({str(tmp_path)!r}), torch.device('cpu'), reference='made', dtype='auto', quantization='none', rows=8, "
        "most_positions=256)\n"
        "sys.exit(sorted(name for name in sys.modules if name.partition('.')[0] == 'transformers')[:3] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    made(tmp_path, "llama", **more)
    where = torch.float32, torch.device("cpu"), "made"
    assert read_checkpoint(tmp_path, *where) is not None
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.startswith("model.layers.1"):
            save_file({other: weights[other] for other in weights if other != name}, file)
            with pytest.raises(
                ModelError, match=re.escape(f"the weights of made do not fit its config.json (missing: {name})")
            ):
                read_checkpoint(tmp_path, *where)
    save_file({**weights, "model.layers.0.surprise": torch.ones(1)}, file)
    with pytest.raises(ModelError, match=r"unknown: model\.layers\.0\.surprise"):
        read_checkpoint(tmp_path, *where)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="damaged"):
        read_checkpoint(tmp_path, *where)


@torch.inference_mode()
def test_int8_cuts_no_sum() -> None:
    """Without VNNI two products are added in 16 bits: of the largest weights and inputs that would be half of the sum."""
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.fill_(1.0)
    for rows in (1, 4, 40):
        torch.testing.assert_close(quantize_int8(linear)(torch.ones(rows, 64)), torch.full((rows, 32), 64.0))


def test_a_large_row_does_not_drown_the_rows_beside_it() -> None:
    """As the first token of a prompt would: in int8 all its neighbours were rounded to nothing."""
    torch.manual_seed(3)
    for shape in ((96, 32), (32, 96)):
        linear = torch.nn.Linear(*shape)
        rows = torch.randn(20, shape[0])
        alone = torch.stack([quantize_int8(linear)(row[None])[0] for row in rows])
        rows[0] *= 1000
        beside = quantize_int8(linear)(rows)
        assert (beside[1:] - alone[1:]).norm() < 0.02 * alone[1:].norm()


def test_no_matrix_of_a_layer_stays_in_the_weights(tmp_path: Path) -> None:
    """Joined matrices are new ones: with the parts they would take twice the memory until all of the model is loaded."""
    made(tmp_path, "llama", tie_word_embeddings=True)
    checkpoint = read_checkpoint(tmp_path, torch.float32, torch.device("cpu"), "made")
    assert checkpoint is not None
    Decoder(checkpoint.weights, checkpoint.config, *checkpoint.rope(64, torch.float32))
    assert [name for name, weight in checkpoint.weights.items() if weight.dim() > 1] == ["model.embed_tokens.weight"]
