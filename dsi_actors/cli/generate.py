"""`dsi-actors generate`: one prompt, answered on the terminal as tokens are committed."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table

from dsi_actors.config import ALGORITHMS, NGRAM, Algorithm, Config, Sampling
from dsi_actors.console.options import (
    SubParsers,
    add_algorithm_options,
    add_cluster_options,
    add_sampling_options,
    add_worker_options,
    config_from,
    sampling_from,
    utf8,
)
from dsi_actors.console.progress import ShownProgress
from dsi_actors.console.terminal import can_show, terminal
from dsi_actors.errors import ConfigError, NoTargetError
from dsi_actors.host.advice import worker_command
from dsi_actors.host.engine_choice import faster_here
from dsi_actors.host.requirements import require_models
from dsi_actors.models import target_tokenizer
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.planning.estimates import Estimates
from dsi_actors.results import CommittedTokens, GenerationReport
from dsi_actors.text import TextAssembler
from dsi_actors.text_stream import PreparedText, TextRequest
from dsi_actors.tokenization.sampling_defaults import DEFAULT_NAMES, described_defaults
from dsi_actors.tokenizer import Tokenizer, TokenStream
from dsi_actors.tracing.record import Recorder, open_recording

_ACCEPTED_STYLE, _ALTERNATIVE_STYLE = Style(color="green"), Style(color="magenta")
_LABELS: dict[str, str] = {"ar": "AR", "si": "SI", "dsi": "DSI"}


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("generate", help="answer one prompt", description=__doc__)
    parser.add_argument("prompt", type=utf8, metavar="PROMPT", help="the prompt, or - to read it from standard input")
    add_worker_options(parser)
    add_cluster_options(parser)
    add_algorithm_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--logprobs", action="store_true", help="with --json: the target's log probability of each token"
    )
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, not as a chat message")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens whatever the model says")
    parser.add_argument("--listen", metavar="ENDPOINT", help="use workers that connect here, start none")
    parser.add_argument("--keys", metavar="DIRECTORY", help="with --listen: only workers with a key of dsi-actors keys")
    parser.add_argument("--insecure", action="store_true", help="allow --listen for other machines without keys")
    parser.add_argument(
        "--resume", metavar="FILE", help="go on where an earlier run of this prompt ended: what it printed with --json"
    )
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="S",
        help="with --listen: how long to wait for a target server and a drafter (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--record", metavar="FILE", help="keep what happens, for dsi-actors trace FILE")
    parser.add_argument("--compare", action="store_true", help="then run AR, SI and DSI on the same workers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=run)


@dataclass(slots=True)
class _Run:
    """One generation: its tokens, which of them had been drafted, which as an alternative, and what it cost."""

    #: The tokens whose text the answer continues, if it does not stand alone.
    after: Sequence[int]
    #: What an earlier run had given.
    resumed: list[int]
    token_ids: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    by_alternative: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    report: GenerationReport | None = None

    def add(self, tokens: CommittedTokens) -> None:
        self.token_ids.extend(tokens)
        self.accepted.extend(tokens.accepted)
        self.by_alternative.extend(tokens.by_alternative)
        self.logprobs.extend(tokens.logprobs)

    def as_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        assert self.report is not None
        came = {"accepted": self.accepted, "by_alternative": self.by_alternative}  # of each token that was not resumed
        logprobs = {"logprobs": self.logprobs} if self.logprobs else {}
        return {**self.so_far(tokenizer), **came, **logprobs, **self.report.as_dict()}

    def so_far(self, tokenizer: Tokenizer) -> dict[str, Any]:
        token_ids = self.resumed + self.token_ids
        return {"text": tokenizer.decode(token_ids, after=self.after), "token_ids": token_ids}


async def run(arguments: argparse.Namespace) -> int:
    config = config_from(arguments, listen=arguments.listen, insecure=arguments.insecure, keys=arguments.keys)
    require_models(config.local_models, *config.local_extras)
    resumed = [] if arguments.resume is None else _read_tokens(arguments.resume)
    # What cannot be used shows before anything is fetched.
    given = {**sampling_from(arguments), "logprobs": arguments.logprobs}
    request = TextRequest(_prompt(arguments), given, raw=arguments.raw, ignore_eos=arguments.ignore_eos)
    with ShownProgress() as progress:
        tokenizer = await target_tokenizer(config, progress)
    asked = request.prepared(tokenizer)
    sampling, after = asked.sampling, [*asked.after, *resumed]
    out, err = terminal(soft_wrap=True), terminal(stderr=True)
    with _opened(arguments.record) as record, ShownProgress() as progress:
        progress(_greeting(config), None, "")
        async with Orchestrator(config, report=progress) as orchestrator:
            if config.insecure:
                err.print("--insecure: whoever can reach this address can take part, unseen and unencrypted")
            if config.listen is not None:
                await _wait_for_workers(orchestrator, arguments, err)
            progress.close()
            err.print(_calibration(orchestrator.estimates))
            if tokenizer.sampling_defaults:
                err.print(
                    f"sampling: {_settings(sampling)} ({described_defaults(tokenizer.sampling_defaults)})",
                    soft_wrap=True,
                )
            session = _Session(orchestrator, asked, resumed, arguments)
            recorder = None if record is None else Recorder(record, {w.number: str(w) for w in orchestrator.workers})
            try:
                with nullcontext() if recorder is None else orchestrator.observe(recorder):
                    printer = None if arguments.json else _Printer(out, TextAssembler(tokenizer, (), after=after))
                    first = await session.generate(arguments.algorithm, printer)
            except NoTargetError as error:
                if arguments.json:  # so that --resume can go on from here
                    out.print_json(data={"error": str(error), **session.runs[-1].so_far(tokenizer)}, ensure_ascii=True)
                raise
            if recorder is not None:
                recorder.end(_texts(first.token_ids, tokenizer.stream(after=after)))
            if not arguments.json and config.listen is None and (hint := _hint(config)) is not None:
                err.print(hint, soft_wrap=True)
            if arguments.compare:
                return await _compare(session, first, arguments, tokenizer, out)
    if arguments.json:
        assert first.report is not None
        more = {"sampling": _settings_dict(sampling), "trace": asdict(first.report.trace)}
        out.print_json(data=first.as_dict(tokenizer) | more, ensure_ascii=True)
    else:
        _print_summary(out, first)
    return 0


@dataclass(frozen=True, slots=True)
class _Session:
    orchestrator: Orchestrator
    asked: PreparedText
    resumed: list[int]
    arguments: argparse.Namespace
    runs: list[_Run] = field(default_factory=list)

    async def generate(self, algorithm: Algorithm, printer: _Printer | None = None) -> _Run:
        self.runs.append(result := _Run(self.asked.after, self.resumed))
        async with self.orchestrator.generate(
            self.asked.prompt_ids,
            self.asked.sampling,
            algorithm=algorithm,
            lookahead=self.arguments.lookahead,
            rows=self.arguments.rows,
            resumed=self.resumed,
        ) as stream:
            async for tokens in stream:
                result.add(tokens)
                if printer is not None:
                    printer.show(tokens)
            result.report = await stream.report()
        if printer is not None:
            printer.end()
        return result


class _Printer:
    """Text as it is committed; what the drafter had guessed right is green, or magenta where an alternative was right."""

    def __init__(self, console: Console, text: TextAssembler) -> None:
        self._console = console
        self._text = text

    def show(self, tokens: CommittedTokens) -> None:
        for token, accepted, alternative in zip(tokens, tokens.accepted, tokens.by_alternative, strict=True):
            style = _ALTERNATIVE_STYLE if alternative else _ACCEPTED_STYLE if accepted else None
            self._write(self._text.add(CommittedTokens((token,), (accepted,))).text, style)
        self._console.file.flush()

    def end(self) -> None:
        self._write(self._text.rest().text + "\n\n")

    def _write(self, text: str, style: Style | None = None) -> None:
        """As it is: for a text, `print` would expand tabs, drop carriage returns and replace :smile:."""
        self._console.print(Segments([Segment(text, style)]), end="")


def _texts(token_ids: Sequence[int], stream: TokenStream) -> list[str]:
    """The text of each token. The last one has what is left at the end, too."""
    texts = [stream.add(token) for token in token_ids]
    return [*texts[:-1], texts[-1] + stream.flush()] if texts else []


def _opened(path: str | None) -> AbstractContextManager[IO[str] | None]:
    return nullcontext() if path is None else open_recording(path)


def _read_tokens(path: str) -> list[int]:
    try:
        tokens = json.loads(Path(path).read_text(encoding="utf-8"))["token_ids"]
    except OSError as error:
        raise ConfigError(f"cannot read --resume {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        tokens = None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ConfigError(f"--resume {path} has no token_ids: give what an earlier run printed with --json")
    return tokens


def _prompt(arguments: argparse.Namespace) -> str:
    text: str = _read_prompt() if arguments.prompt == "-" else arguments.prompt
    if not text.strip():
        raise ConfigError("the prompt is empty: give some text")
    return text


def _read_prompt() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ConfigError("the prompt on standard input is no UTF-8") from None


def _greeting(config: Config) -> str:
    if config.listen is not None:
        return f"listening on {config.listen}"
    drafter = "a drafter for each of " if len(config.drafters) > 1 else "a drafter "
    drafter = f"{drafter}({', '.join(config.drafters)})" if config.drafters else "no drafter"
    return f"starting {config.local_servers} target server(s) ({config.target}) and {drafter}"


def _hint(config: Config) -> str | None:
    """What would be faster on this machine."""
    drafters = [drafter for drafter in config.drafters if drafter != NGRAM]
    workers = config.local_servers + min(1, len(drafters))
    return faster_here(config.engine, config.target, config.devices, workers=workers, options=config.target_options)


def _calibration(known: Estimates) -> str:
    if known.target_ms <= 0:
        return "not calibrated: latencies are measured as the generation goes"
    window = f" ({known.window_ms:.1f} for {known.window} positions)" if known.window > 1 else ""
    drafter = f", a drafted token {known.drafter_ms:.1f} ms" if known.drafter_ms > 0 else ""
    if drafter and known.drafter_row > 0:
        drafter += f" ({100 * known.drafter_row:.0f} % more for each branch beside it)"
    return f"calibrated: a verification takes {known.target_ms:.1f} ms{window}{drafter}"


def _settings_dict(sampling: Sampling) -> dict[str, float | None]:
    return {name: getattr(sampling, name) for name in (*DEFAULT_NAMES, "seed")}


def _settings(sampling: Sampling) -> str:
    return ", ".join(f"{name} {value}" for name, value in _settings_dict(sampling).items() if value is not None)


async def _wait_for_workers(orchestrator: Orchestrator, arguments: argparse.Namespace, err: Console) -> None:
    config = orchestrator.config
    drafters = 0 if not config.drafters or arguments.algorithm == "ar" else 1
    wanted = "a target server" + (" and a drafter" if drafters else "")
    err.print(f"waiting for {wanted}: {worker_command(orchestrator.endpoint, keys=config.keys)}", soft_wrap=True)
    while not await orchestrator.wait_for_workers(targets=1, drafters=drafters, timeout_s=arguments.wait):
        if orchestrator.preparing:
            continue
        if not await orchestrator.wait_for_workers(targets=1, drafters=0, timeout_s=0.001):
            raise ConfigError(f"no target server connected to {orchestrator.endpoint} within {arguments.wait:g} s")
        err.print("no drafter came: decoding without one")
        return


# What is printed at the end


def _print_summary(out: Console, run: _Run) -> None:
    report = run.report
    assert report is not None
    out.print(_marks(run, out))
    out.print(
        f"{report.tokens} tokens by {_LABELS[report.algorithm]} on {report.sp} target server(s): "
        f"{report.ms_per_token:.1f} ms per token, first after {report.first_token_ms:.0f} ms; "
        f"acceptance rate {report.acceptance_rate:.2f}, {report.target_forwards} target forwards "
        f"({report.wasted_target_forwards} wasted)"
    )


def _marks(run: _Run, out: Console) -> str:
    """One mark per token, for terminals without colour too."""
    drafted, alternative, own = "●◆○" if can_show("●◆○", out) else "#+."
    marks = "".join(
        alternative if by_alternative else drafted if accepted else own
        for accepted, by_alternative in zip(run.accepted, run.by_alternative, strict=True)
    )
    alternatives = sum(run.by_alternative)
    legend = [f"{drafted} drafted and accepted: {sum(run.accepted) - alternatives}"]
    if alternatives:
        legend.append(f"{alternative} drafted as an alternative, and accepted: {alternatives}")
    legend.append(f"{own} the target's own: {run.accepted.count(False)}")
    return f"{marks}\n{'   '.join(legend)}"


async def _compare(
    session: _Session, first: _Run, arguments: argparse.Namespace, tokenizer: Tokenizer, out: Console
) -> int:
    runs: dict[Algorithm, _Run] = {arguments.algorithm: first}
    for algorithm in ALGORITHMS:
        if algorithm not in runs:
            runs[algorithm] = await session.generate(algorithm)
    identical = all(run.token_ids == first.token_ids for run in runs.values())
    if arguments.json:
        rows = [runs[algorithm].as_dict(tokenizer) for algorithm in ("ar", "si", "dsi")]
        out.print_json(data={"identical": identical, "results": rows}, ensure_ascii=True)
        return 0 if identical else 1
    out.print(_marks(first, out))
    out.print(_table(runs))
    if identical:
        out.print("The three outputs are the same, token for token.")
        return 0
    out.print("The three outputs DIFFER.", style="bold red")
    return 1


def _table(runs: dict[Algorithm, _Run]) -> Table:
    table = Table()
    branched = any(sum(run.by_alternative) for run in runs.values())
    by_alternative = ("by alternatives",) if branched else ()
    for column in ("", "ms/token", "first ms", "accepted", *by_alternative, "forwards", "wasted", "sp", "lookahead"):
        table.add_column(column, justify="right")
    for algorithm in ("ar", "si", "dsi"):
        run = runs[algorithm]
        report = run.report
        assert report is not None
        drafted = report.algorithm != "ar"
        cells = [_LABELS[algorithm], f"{report.ms_per_token:.1f}", f"{report.first_token_ms:.0f}"]
        cells.append(f"{report.acceptance_rate:.2f}" if drafted else "-")
        if branched:
            cells.append(str(sum(run.by_alternative)) if drafted else "-")
        cells += [str(report.target_forwards), str(report.wasted_target_forwards), str(report.sp)]
        table.add_row(*cells, str(report.lookahead) if drafted else "-")
    return table
