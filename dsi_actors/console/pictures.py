"""Pictures of plans and grids, by matplotlib: the extra `pictures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsi_actors.errors import ConfigError
from dsi_actors.host.requirements import require

_FORMATS = (".png", ".svg", ".pdf")
#: By degree of TP.
_MARKERS = "osD^v"


def check_picture(file: str | None) -> None:
    """Before work starts. Raises ConfigError."""
    if file is None:
        return
    if Path(file).suffix not in _FORMATS:
        raise ConfigError(f"--picture {file}: the name must end with {', '.join(_FORMATS)}")
    if not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--picture {file}: there is no such directory")
    _pyplot()


def _pyplot() -> Any:
    require("a picture", "pictures")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_plan(file: str, title: str, rows: Sequence[dict[str, Any]], limit_ms: float | None) -> None:
    """Expected ms per token by the number of GPUs, for each algorithm and degree of TP; one number alone is a level."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    degrees = sorted({row["tp"] for row in rows})
    for place, tp in enumerate(degrees):
        for name, colour in (("dsi", "C2"), ("ar", "C3"), ("si", "C0")):
            points = [(row["gpus"], row["ms_per_token"]) for row in rows if (row["algorithm"], row["tp"]) == (name, tp)]
            label = name.upper() + (f", TP={tp}" if len(degrees) > 1 else "")
            if len(points) == 1 and len(degrees) == 1:
                axes.axhline(points[0][1], color=colour, linestyle="--", label=f"{label} ({points[0][1]:.1f} ms)")
            elif points:
                axes.plot(*zip(*points, strict=True), f"{_MARKERS[place % len(_MARKERS)]}-", color=colour, label=label)
    if limit_ms is not None:
        axes.axhline(limit_ms, color="0.5", linestyle=":", label=f"limit a d + (1-a) t ({limit_ms:.1f} ms)")
    axes.set(xlabel="GPUs, with the drafter's", ylabel="expected ms per token", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_heat_maps(
    file: str, title: str, panels: Sequence[tuple[str, Sequence[Sequence[float]]]],
    shares: Sequence[float], acceptances: Sequence[float],
) -> None:  # fmt: skip
    """Ratios of times, one panel each: [acceptance][drafter latency]. Below 1 (blue) the first one is faster."""
    pyplot = _pyplot()
    from matplotlib.colors import LogNorm

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 8), layout="constrained", sharex=True, sharey=True)
    image = None
    for axes, (name, values) in zip(grid.flat, panels, strict=True):
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap="RdBu_r", norm=LogNorm(0.25, 4),
            extent=(*_edges(shares), *_edges(acceptances)), interpolation="nearest",
        )  # fmt: skip
        flat = [value for row in values for value in row]
        axes.set_title(f"{name}   ({min(flat):.2f} to {max(flat):.2f})")
        if min(len(shares), len(acceptances)) > 1 and min(flat) < 1 < max(flat):
            axes.contour(shares, acceptances, values, levels=[1.0], colors="black", linewidths=1)
    for axes in grid[1]:
        axes.set_xlabel("drafter latency / target latency")
    for axes in grid[:, 0]:
        axes.set_ylabel("acceptance rate")
    bar = figure.colorbar(image, ax=grid, ticks=[0.25, 0.5, 1, 2, 4], label="ratio of times per token")
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels(["0.25", "0.5", "1", "2", "4"])
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _edges(centres: Sequence[float]) -> tuple[float, float]:
    half = (centres[-1] - centres[0]) / max(1, len(centres) - 1) / 2 or 0.5
    return centres[0] - half, centres[-1] + half
