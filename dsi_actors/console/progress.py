"""What is going on until the first request can be answered, on the terminal."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dsi_actors.config import Config
from dsi_actors.models import prepare_models, resolve_model
from dsi_actors.progress import ProgressLines


class ShownProgress:
    """A Report on standard error: one live line on a terminal, else lines. A context manager; outside of its block nothing is
    shown."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._lines = ProgressLines(lambda line: self._console.print(line, soft_wrap=True, markup=False))
        self._bar: Progress | None = None
        self._open = False

    def __enter__(self) -> Self:
        self._open = True
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Show nothing any more."""
        self._open = False
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float | None, detail: str) -> None:
        if not self._open:
            return
        if self._bar is None:
            self._lines(what, done, detail)
            return
        tasks = self._bar.tasks
        if not tasks or tasks[0].description != what:
            for task in tasks:
                self._bar.remove_task(task.id)
            self._bar.add_task(what, total=None if done is None else 1.0, detail=detail)
            self._bar.update(self._bar.tasks[0].id, completed=done)
        else:
            self._bar.update(tasks[0].id, completed=done, detail=detail)


async def prepare_shown(config: Config) -> None:
    """Fetch and convert what an orchestrator with this configuration would: what it takes is shown. Raises ConfigError."""
    with ShownProgress() as progress:
        await prepare_models(config, progress)


async def model_directory(reference: str) -> Path:
    """The directory of a model. What it takes to get it is shown. Raises ConfigError."""
    with ShownProgress() as progress:
        return await resolve_model(reference, report=progress)
