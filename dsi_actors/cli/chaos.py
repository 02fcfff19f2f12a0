"""`dsi-actors chaos`: workers are killed and stopped, messages lost and doubled, while generations run. Is any text lost?

Real worker processes with the `timed` engine, or with the model --target (run by --engine), behind a proxy of our own. With
--tp each target server is a group of processes, whose ranks are killed and stopped, too. Exits with 1 if a generation was lost,
or gave another text than plain decoding without faults, or if anything was left behind.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from rich.table import Table

from dsi_actors.chaos.run import FAULTS, FAULTS_OF_GROUPS, Chaos, as_dict
from dsi_actors.config import LLAMA_CPP, TRANSFORMERS, Config
from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option, default_of
from dsi_actors.console.progress import prepare_shown
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("chaos", help="kill workers, lose messages, compare texts", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="default %(default)s")
    parser.add_argument(
        "--faults", type=int, metavar="N", help="end after so many faults, however long they take, not after --minutes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which faults in which order")
    parser.add_argument("--pause", type=float, default=2.0, metavar="S", help="between faults, on average")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="of each generation")
    parser.add_argument("--target-ms", type=float, default=20.0, metavar="T", help="milliseconds of a verification")
    parser.add_argument("--drafter-ms", type=float, default=4.0, metavar="D", help="milliseconds of a drafted token")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="A", help="chance that a draft is right")
    parser.add_argument(
        "--target", metavar="REF", help="workers compute with this model on the CPU, and take what it takes"
    )
    parser.add_argument(
        "--engine", choices=[TRANSFORMERS, LLAMA_CPP], default=TRANSFORMERS,
        help="that runs the model of --target (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=int, default=default_of(Config, "tp"), metavar="N", help="processes of each target server"
    )
    parser.add_argument(
        "--kinds", metavar="LIST", help=f"only these faults, of {', '.join({**FAULTS, **FAULTS_OF_GROUPS})}"
    )
    parser.add_argument("--detection-ms", type=int, default=2000, metavar="D", help="silence that means death")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run, log_level="error")


async def run(arguments: argparse.Namespace) -> int:
    if arguments.minutes <= 0 or arguments.pause <= 0 or arguments.tokens < 1:
        raise ConfigError("--minutes and --pause must be above 0, --tokens at least 1")
    if arguments.faults is not None and arguments.faults < 1:
        raise ConfigError("--faults must be at least 1")
    config = _config(arguments)
    kinds = arguments.kinds.split(",") if arguments.kinds else []
    possible = {**FAULTS, **(FAULTS_OF_GROUPS if config.tp > 1 else {})}
    if unknown := [kind for kind in kinds if kind not in possible]:
        of_groups = " without --tp" if unknown[0] in FAULTS_OF_GROUPS else ""
        raise ConfigError(f"--kinds: {unknown[0]!r} is no fault{of_groups}: choose from {', '.join(possible)}")
    await prepare_shown(config)
    chaos = Chaos(
        seconds=60 * arguments.minutes if arguments.faults is None else math.inf, faults=arguments.faults or math.inf,
        seed=arguments.seed, tokens=arguments.tokens, pause_s=arguments.pause, config=config,
        kinds=kinds,
    )  # fmt: skip
    outcome = as_dict(await chaos.run(), config)
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), **outcome}) + "\n")
    else:
        table = Table("", "")
        for name, value in outcome.items():
            table.add_row(name, f"{value:.0f}" if isinstance(value, float) else str(value))
        terminal().print(table)
    bad = ("lost", "differing", "leaked_processes", "leaked_descriptors")
    return 1 if any(outcome[name] for name in bad) else 0


def _config(arguments: argparse.Namespace) -> Config:
    """Raises ConfigError."""
    if arguments.tp > 1 and arguments.target is None:
        raise ConfigError(f"--tp {arguments.tp}: only a model can be divided among processes: give --target, too")
    if arguments.engine != TRANSFORMERS and arguments.target is None:
        raise ConfigError(f"--engine {arguments.engine} needs a model: give --target, too")
    common: dict[str, Any] = {
        "devices": ("cpu",), "log_level": arguments.log_level, "silence_ms": arguments.detection_ms,
        "heartbeat_ms": arguments.detection_ms // 8, "restarts": 1_000_000,
    }  # fmt: skip
    if arguments.target is not None:
        # A worker that is started again begins at once, and with the bits of the others.
        return Config(
            target=arguments.target, engine=arguments.engine, sp=1, tp=arguments.tp, calibrate=False, **common
        )
    drafter = {"latency_ms": arguments.drafter_ms, "acceptance": arguments.acceptance, "alternatives": 0.5}
    return Config(
        engine="timed", sp=2, target_options={"latency_ms": arguments.target_ms}, drafter_options=drafter, **common
    )
