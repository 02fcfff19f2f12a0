"""A model without asyncio, for notebooks and scripts: `with open(target=...) as model`, then `model.answer(...)`.

The orchestrator runs in an event loop in a thread of its own, so it works beside an event loop that runs already, such as
Jupyter's. The thread is a daemon, because Python waits for other threads before it calls what atexit has; there the model is
closed. At that moment Python starts no new thread, so closing starts none.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar, Unpack

from dsi_actors.config import Config
from dsi_actors.errors import ConfigError, OrchestratorClosed
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.progress import Report
from dsi_actors.results import Answer, GenerationReport
from dsi_actors.text_stream import Prompt, TextOptions, TextStream

_Value = TypeVar("_Value")


def open(config: Config | None = None, *, report: Report | None = None, **settings: Any) -> Model:
    """A model that is ready to answer. Give a `Config`, or its fields by name.

    Starts the workers, and returns once all are ready; `report` is told what happens meanwhile. Close it by `with` or `close`.
    Otherwise it is closed when nothing refers to it any more, or when Python ends. Raises what an `Orchestrator` raises, and
    ConfigError for a target without a tokenizer."""
    if config is not None and settings:
        raise ConfigError(f"give a Config or its fields, not both: put {', '.join(settings)} into the Config")
    return Model(Config(**settings) if config is None else config, report)


class Model:
    """Answers in text. Threads may share it."""

    def __init__(self, config: Config, report: Report | None) -> None:
        self._thread = _LoopThread(config, report)
        weakref.finalize(self, self._thread.begin_end).atexit = False
        try:
            self._thread.call(self._thread.start())
        except BaseException:
            self._thread.end()
            raise

    def answer(self, prompt: Prompt, **options: Unpack[TextOptions]) -> Answer:
        """The whole text that `generate_text` gives. Ctrl-C cancels it, and the model stays usable."""
        return self._thread.call(self._thread.orchestrator.answer(prompt, **options))

    def generate_text(self, prompt: Prompt, **options: Unpack[TextOptions]) -> TextPieces:
        """As `Orchestrator.generate_text`: iterate over the result for pieces of text. Leaving the loop cancels the work."""
        return TextPieces(self, self._thread, self._thread.orchestrator.generate_text(prompt, **options))

    @property
    def process_ids(self) -> list[int]:
        """The local worker processes."""
        return self._thread.orchestrator.process_ids

    def close(self) -> None:
        """Returns once no process and no thread is left. Generations that run end with OrchestratorClosed."""
        self._thread.end()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TextPieces(Iterator[str]):
    """Iterator over the text of an answer, piece by piece. Work starts with the first iteration."""

    def __init__(self, model: Model, thread: _LoopThread, stream: TextStream) -> None:
        self._model = model  # stays open as long as this is read
        self._thread = thread
        self._stream = stream

    def __next__(self) -> str:
        piece = self._thread.call(_next(self._stream))
        if piece is None:
            raise StopIteration
        return piece

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return list(self._stream.token_ids)

    def report(self) -> GenerationReport:
        """What the answer cost, once the last piece was given."""
        return self._thread.call(self._stream.report())

    def close(self) -> None:
        """Cancel the rest, and wait until no work is left."""
        self._thread.call(self._stream.aclose())


async def _next(stream: TextStream) -> str | None:
    return await anext(stream, None)


class _LoopThread:
    """An event loop in a thread, and the orchestrator in it, until `end`."""

    def __init__(self, config: Config, report: Report | None) -> None:
        self.orchestrator = Orchestrator(config, report=report)
        self._loop = asyncio.SelectorEventLoop()
        #: Of `start`, and of the end.
        self._starting: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closed = False
        self._error: BaseException | None = None
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._run, name="dsi-actors", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    async def start(self) -> None:
        self._starting = asyncio.current_task()
        await self.orchestrator.tokenizer()  # without one, nothing is started
        await self.orchestrator.__aenter__()

    def call(self, work: Coroutine[Any, Any, _Value]) -> _Value:
        """What the work gives. An exception that comes meanwhile, such as Ctrl-C, cancels the work."""
        if self._closed or os.getpid() != self._process_id:
            work.close()
            raise OrchestratorClosed("the model is closed: open it again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise OrchestratorClosed("the model was closed meanwhile") from None
        finally:
            future.cancel()

    def end(self) -> None:
        """Returns once the thread has ended, and with it the orchestrator and its workers. Any thread may call it, and again."""
        self.begin_end()
        if os.getpid() == self._process_id and threading.current_thread() is not self._thread:
            self._thread.join()
            error, self._error = self._error, None
            if error is not None:
                raise error

    def begin_end(self) -> None:
        """The same without waiting: for the garbage collector, which may run in any thread."""
        self._closed = True
        if os.getpid() == self._process_id:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(self._create_end)

    def _create_end(self) -> None:
        if self._ending is None:
            self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        try:
            if self._starting is not None:
                self._starting.cancel()
                await asyncio.wait([self._starting])
                if not self._starting.cancelled() and self._starting.exception() is None:
                    await self.orchestrator.__aexit__(None, None, None)
        except BaseException as error:
            self._error = error
        finally:
            self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            atexit.unregister(self.end)
