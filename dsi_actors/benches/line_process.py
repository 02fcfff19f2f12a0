"""A process of ours that reads one JSON request per line and writes one JSON answer per line: what benchmarks measure or
measure against, where it needs torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from types import TracebackType
from typing import Any, Self

from dsi_actors.errors import DsiError
from dsi_actors.host.requirements import require

_LINE_BYTES = 1 << 24


class LineProcess:
    """Use as an async context manager: it is ready when the block is entered, and ended when it is left."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        #: What it said when it was ready.
        self.greeting: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        require("this benchmark", "torch")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self._module, *self._arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES,
        )  # fmt: skip
        try:
            self.greeting = await self._answer()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def ask(self, **request: Any) -> dict[str, Any]:
        """Raises DsiError if the process ends instead of answering."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended: there is no answer to read
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            await self._process.stdin.drain()
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise DsiError(f"the process {self._module}, which is to be measured, ended (see above)")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def _end(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()  # it holds nothing
        await self._process.wait()
