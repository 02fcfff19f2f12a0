"""Recorded forwards compute what the decoder computes. Without a GPU their parts run as they are: the buffers, the warm-up, the
writing by index and the order are those of the graphs; capturing itself needs a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsi_workers.decoder import Decoder
from dsi_workers.device_bench import SHAPES, _random_weights
from dsi_workers.engines.base import Interrupted
from dsi_workers.engines.forward import Forward, Run
from dsi_workers.graphs import GraphedDecoder, _Recording
from support.engines import InterruptAfter

CPU = torch.device("cpu")
WINDOW = 12


def forward(*, graphs: bool, slides: bool = False) -> Forward:
    shape = SHAPES["tiny"]
    config: Any = SimpleNamespace(
        rms_norm_eps=1e-5, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.dim, hidden_size=shape.hidden,
    )  # fmt: skip
    if slides:
        config.sliding_window = WINDOW
        config.layer_types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    angles = torch.outer(torch.arange(1024), 5e5 ** -torch.linspace(0, 1, shape.dim // 2))
    angles = torch.cat((angles, angles), dim=-1)
    decoder = Decoder(_random_weights(shape, CPU, torch.float32), config, angles.cos(), angles.sin())
    decodes = GraphedDecoder(decoder, device=CPU) if graphs else decoder
    return Forward(decodes, config, CPU, slots=2, capacity=1024, last_position=1023)


@pytest.mark.parametrize("slides", [False, True])
def test_any_forwards_give_the_same_bits(slides: bool) -> None:
    plain, recorded = forward(graphs=False, slides=slides), forward(graphs=True, slides=slides)
    chance = random.Random(3)
    lengths = [0, 0]
    for turn in range(60):
        slot = chance.randrange(2)
        width = chance.choice((1, 4, 8, 40))
        begin = min(chance.randrange(lengths[slot] + 1), 900)
        tokens = [chance.randrange(256) for _ in range(min(width, chance.randrange(1, width + 1)))]
        run = Run(slot, tokens, begin, width, begin + len(tokens) // 2)
        ours, theirs = (each([run], rows=width, logit_rows=width)[0] for each in (recorded, plain))
        assert torch.equal(ours, theirs), turn
        lengths[slot] = max(lengths[slot], begin + len(tokens))
        if turn == 40:  # its memory goes, and is another one when it comes back
            plain.cache.release(slot)
            recorded.cache.release(slot)
            lengths[slot] = 0
    assert isinstance(recorded._decoder, GraphedDecoder)
    assert 1 < len(recorded._decoder._recordings) <= 2 * 3 * 2


def test_parts_hand_on_what_they_compute_in_fixed_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """As graphs do: a part reads what it read when it was captured, and writes where it wrote then, whatever is named since."""
    recordings: list[_Recording] = []
    plain_record = _Recording.record

    def record(recording: _Recording, capture: Any) -> None:
        recordings.append(recording)
        plain_record(recording, capture)

    def capture(decoder: GraphedDecoder, part: Any) -> Any:
        recording = recordings[-1]
        given = None if recording._state is None else replace(recording._state)
        part()
        written, logits = recording._state, recording.logits
        assert written is not None
        kept = replace(written)

        def replay() -> None:
            recording._state = given
            part()
            now = recording._state
            assert now is not None
            for place, value in ((kept.x, now.x), (kept.cos, now.cos), (kept.sin, now.sin)):
                place.copy_(value)
            for mask, new_mask in zip(kept.masks[""], now.masks[""], strict=True):
                assert mask is not None
                assert new_mask is not None
                mask.copy_(new_mask)
            recording._state = kept
            if logits is not None and recording.logits is not None:
                logits.copy_(recording.logits)
                recording.logits = logits

        return replay

    monkeypatch.setattr(_Recording, "record", record)
    monkeypatch.setattr(GraphedDecoder, "_capture", capture)
    plain, recorded = forward(graphs=False), forward(graphs=True)
    for begin in range(0, 40, 4):
        run = Run(0, [begin, begin + 7, 3, 90], begin, 4, begin)
        assert torch.equal(recorded([run], rows=4, logit_rows=4)[0], plain([run], rows=4, logit_rows=4)[0])
    assert len(recordings) == 1


def test_several_generations_go_the_other_way() -> None:
    plain, recorded = forward(graphs=False), forward(graphs=True)
    runs = [Run(slot, [slot + 1, 7], 0, 2, 0) for slot in (0, 1)]
    for ours, theirs in zip(recorded(runs, rows=4, logit_rows=4), plain(runs, rows=4, logit_rows=4), strict=True):
        assert torch.equal(ours, theirs)
    assert isinstance(recorded._decoder, GraphedDecoder)
    assert not recorded._decoder._recordings


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_an_interrupt_takes_effect_within_a_forward_and_leaves_no_trace(checks: int) -> None:
    plain, recorded = forward(graphs=False), forward(graphs=True)
    run = Run(0, [5, 6, 7], 0, 4, 0)
    recorded.interrupt = InterruptAfter(checks)
    with pytest.raises(Interrupted):
        recorded([run], rows=4, logit_rows=4)
    recorded.interrupt = InterruptAfter(1 << 30)
    assert torch.equal(recorded([run], rows=4, logit_rows=4)[0], plain([run], rows=4, logit_rows=4)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording needs a CUDA device")
def test_on_a_gpu_recorded_forwards_give_the_bits_of_the_others(tmp_path: Path) -> None:
    shape, device = SHAPES["tiny"], torch.device("cuda:0")
    config: Any = SimpleNamespace(
        rms_norm_eps=1e-5, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.dim, hidden_size=shape.hidden,
    )  # fmt: skip
    angles = torch.outer(torch.arange(1024), 5e5 ** -torch.linspace(0, 1, shape.dim // 2))
    angles = torch.cat((angles, angles), dim=-1).to(torch.bfloat16)
    decoder = Decoder(_random_weights(shape, device, torch.bfloat16), config, angles.cos(), angles.sin())
    plain, recorded = (
        Forward(each, config, device, slots=1, capacity=1024, last_position=1023)
        for each in (decoder, GraphedDecoder(decoder, device=device))
    )
    plain._decoder.needs_masks = True
    for begin in range(0, 600, 8):
        run = Run(0, list(range(begin % 200, begin % 200 + 8)), begin, 8, begin)
        assert torch.equal(recorded([run], rows=8, logit_rows=8)[0], plain([run], rows=8, logit_rows=8)[0])
