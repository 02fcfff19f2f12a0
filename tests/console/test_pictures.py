"""What pictures show is what they were given: read back from the figure before it is closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure

from dsi_actors.console.pictures import draw_heat_maps, draw_plan


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **more: Any) -> None:
        save(figure, *arguments, **more)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_each_panel_of_a_heat_map_shows_its_ratios(figures: list[Figure], tmp_path: Path) -> None:
    shares, acceptances = [0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 1.0]
    panels = [
        (name, [[scale * (0.5 + share) / (0.5 + acceptance) for share in shares] for acceptance in acceptances])
        for name, scale in (("SI / AR", 1.0), ("DSI / SI", 0.5), ("DSI / AR", 0.8), ("DSI / min(AR, SI)", 0.1))
    ]
    draw_heat_maps(str(tmp_path / "map.png"), "a title", panels, shares, acceptances)
    [figure] = figures
    assert figure.get_suptitle() == "a title"
    *maps, bar = figure.axes
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0.25", "0.5", "1", "2", "4"]
    for axes, (name, values) in zip(maps, panels, strict=True):
        [image] = axes.images
        assert image.get_array() is not None
        assert image.get_array().tolist() == values, "rows are acceptance rates, columns latencies"  # type: ignore[union-attr]
        assert tuple(image.get_extent()) == (0.125, 1.125, -0.25, 1.25), "a square stands around its value"
        assert axes.get_title().startswith(name)
        low, high = min(map(min, values)), max(map(max, values))
        assert axes.get_title().endswith(f"({low:.2f} to {high:.2f})")
        red, _, blue, _ = image.to_rgba(numpy.array([low]))[0]
        assert (blue > red) == (low < 1), "below 1 is blue"
        assert bool(axes.collections) == (low < 1 < high), "the line where both are as fast"


def test_a_plan_shows_a_curve_and_its_levels(figures: list[Figure], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"algorithm": "ar", "tp": 1, "gpus": 1, "ms_per_token": 20.0},
        {"algorithm": "si", "tp": 1, "gpus": 1, "ms_per_token": 14.0},
        *({"algorithm": "dsi", "tp": 1, "gpus": 1 + sp, "ms_per_token": 8.0 + 8.0 / sp} for sp in (1, 2, 3)),
    ]
    draw_plan(str(tmp_path / "plan.svg"), "a title", rows, 9.5)
    [figure] = figures
    [axes] = figure.axes
    curve, plain, speculative, limit = axes.lines
    assert curve.get_xydata().tolist() == [[2, 16.0], [3, 12.0], [4, 8.0 + 8.0 / 3]]  # type: ignore[union-attr]
    assert [numpy.array(line.get_ydata()).tolist() for line in (plain, speculative, limit)] == [
        [20.0] * 2,
        [14.0] * 2,
        [9.5] * 2,
    ]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "DSI", "AR (20.0 ms)", "SI (14.0 ms)", "limit a d + (1-a) t (9.5 ms)"
    ]  # fmt: skip


def test_a_plan_shows_a_curve_for_each_degree(figures: list[Figure], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"algorithm": name, "tp": tp, "gpus": tp * sp + (name == "dsi"), "ms_per_token": 20.0 / tp / sp}
        for tp in (1, 2)
        for name, most in (("ar", 1), ("dsi", 2))
        for sp in range(1, most + 1)
    ]
    draw_plan(str(tmp_path / "plan.svg"), "a title", rows, None)
    [axes] = figures[0].axes
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
    assert curves == {
        "DSI, TP=1": [[2, 20.0], [3, 10.0]], "AR, TP=1": [[1, 20.0]], "DSI, TP=2": [[3, 10.0], [5, 5.0]], "AR, TP=2": [[2, 10.0]],
    }  # fmt: skip
