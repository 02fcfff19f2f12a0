"""From model references to directories, without torch: what is missing is fetched or converted by a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from dsi_actors.config import NGRAM, NGRAM_FOR, RANDOM, SELF_COPIES, TIMED, TRANSFORMERS, Config, adapter_of
from dsi_actors.errors import ConfigError
from dsi_actors.host.requirements import require
from dsi_actors.logs import get_logger
from dsi_actors.progress import ProgressLines, Report
from dsi_actors.tokenizer import Tokenizer

log = get_logger("models")

_LINE_BYTES = 1 << 20
#: What this process has resolved: a reference means the same for as long as it runs, and is looked up once.
_known: dict[tuple[str, str, bool], Path] = {}
#: What a directory has from which a model is loaded as it is.
_FILES, _WEIGHTS = ("config.json", "tokenizer.json"), ("model.safetensors", "model.safetensors.index.json")


async def resolve_model(
    reference: str, *, adapter: str = "", tokenizer_only: bool = False, report: Report | None = None
) -> Path:
    """The directory of a model. Fetches or converts what is missing, which may take long and may be cancelled: the next call
    goes on there. `report` is told how far it is (without one, the log is). Raises ConfigError.

    `adapter`: the directory of a LoRA adapter to merge into the model. `tokenizer_only`: the weights are not needed, as where
    other machines load them; nothing is merged then."""
    known = _known.get((reference, adapter, tokenizer_only)) or _known.get((reference, adapter, False))
    if known is not None and known.is_dir():
        return known
    require(f"the model {reference!r}", models=[reference])
    directory = None if adapter else _plain_directory(reference, tokenizer_only)
    if directory is None:
        report = report if report is not None else ProgressLines(log.info)
        directory = await _prepared(reference, adapter, tokenizer_only, report)
    _known[reference, adapter, tokenizer_only] = directory
    return directory


async def resolve_target(config: Config, report: Report | None = None) -> Path:
    """The directory of the target, with all that local workers load; only its tokenizer where no local worker loads it. Raises
    ConfigError."""
    adapter = adapter_of(config.target_options)
    return await resolve_model(config.target, adapter=adapter, tokenizer_only=not config.local_models, report=report)


async def target_tokenizer(config: Config, report: Report | None = None) -> Tokenizer:
    """The tokenizer of the target. Raises ConfigError if there is none, or if the engine timed does not say tokens of it."""
    if config.engine == TIMED and "vocabulary_size" not in config.target_options:
        raise ConfigError(
            "the engine timed stands for a model and says no text: use Orchestrator.generate, which takes token ids, or another "
            "engine, or give it the vocabulary_size of the target's tokenizer"
        )
    return await asyncio.to_thread(Tokenizer, await resolve_target(config, report))


async def prepare_models(config: Config, report: Report | None = None) -> None:
    """Make ready what local workers will load: the target and every drafter. Raises ConfigError.

    Does nothing for an engine other than transformers: such an engine gets its models itself."""
    if config.engine != TRANSFORMERS:
        return
    await resolve_model(config.target, adapter=adapter_of(config.target_options), report=report)
    for reference in dict.fromkeys(drafter.removeprefix(NGRAM_FOR) for drafter in config.drafters):
        if reference not in (*SELF_COPIES, NGRAM, RANDOM):
            await resolve_model(reference, adapter=adapter_of(config.drafter_options), report=report)


def _plain_directory(reference: str, tokenizer_only: bool) -> Path | None:
    """The model, if it is a directory already that lacks nothing. Its files are looked at by whoever loads them."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # no name of a file; its worker says why
        path = Path(reference).expanduser()
        whole = all((path / name).is_file() for name in _FILES)
        if reference and whole and (tokenizer_only or any((path / name).is_file() for name in _WEIGHTS)):
            return path
    return None


async def _prepared(reference: str, adapter: str, tokenizer_only: bool, report: Report) -> Path:
    if "\0" in reference + adapter:
        raise ConfigError(f"a model reference has no zero bytes: {reference!r}")
    # In a session of its own, so that the terminal's Ctrl-C reaches us alone. It ends when its standard input does.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dsi_workers.models.preparation", *(["--tokenizer-only"] if tokenizer_only else []),
        *([f"--adapter={adapter}"] if adapter else []), "--", reference,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True, limit=_LINE_BYTES,
    )  # fmt: skip
    assert process.stdout is not None
    last: dict[str, Any] = {}
    try:
        async for line in process.stdout:
            last = json.loads(line)
            if "what" in last:
                report(last["what"], last["done"], last["detail"])
        await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
    if "directory" in last:
        return Path(last["directory"])
    problem = last.get("error") or f"the process that prepares {reference!r} ended with exit code {process.returncode}"
    raise ConfigError(problem)
