"""`dsi-actors serve`: an OpenAI-compatible HTTP service on target servers and a drafter."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from dsi_actors.cli.options import SubParsers, add_worker_options, config_from
from dsi_actors.cli.progress import ShownProgress
from dsi_actors.errors import ConfigError
from dsi_actors.models import resolve_model
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenizer import Tokenizer

_KEYS_VARIABLE = "DSI_API_KEYS"


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("serve", help="OpenAI-compatible HTTP", description=__doc__)
    add_worker_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where HTTP listens (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: its reference)")
    parser.add_argument(
        "--api-keys", metavar="FILE", help=f"one key in each line (or separated by commas in ${_KEYS_VARIABLE})"
    )
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="generations that may wait or run")
    parser.add_argument("--default-max-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--listen", metavar="ENDPOINT", help="use workers that connect here, start none")
    parser.add_argument("--keys", metavar="DIRECTORY", help="with --listen: only workers with a key of dsi-actors keys")
    parser.add_argument("--insecure", action="store_true", help="allow --listen for other machines without keys")
    parser.add_argument("--drain-s", type=float, default=30.0, metavar="S", help="at the end, for requests that run")
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    try:
        from dsi_actors.serving.app import ServiceConfig, create_app
        from dsi_actors.serving.server import make_server
    except ImportError as error:
        raise ConfigError(f"serving needs more packages: pip install 'dsi-actors[serve]' ({error})") from None
    if not 0 <= arguments.port < 1 << 16 or arguments.default_max_tokens < 1 or arguments.drain_s < 0:
        raise ConfigError("--port must be a port, --default-max-tokens at least 1, --drain-s at least 0")
    config = config_from(
        arguments, listen=arguments.listen, insecure=arguments.insecure, keys=arguments.keys,
        max_generations=arguments.max_queue,
    )  # fmt: skip
    service_config = ServiceConfig(
        model=arguments.model_name or config.target, api_keys=_api_keys(arguments.api_keys),
        default_max_tokens=arguments.default_max_tokens,
    )  # fmt: skip
    err = Console(stderr=True, highlight=False)
    with ShownProgress() as progress:
        tokenizer = Tokenizer(await resolve_model(config.target, tokenizer_only=bool(config.listen), report=progress))
        async with Orchestrator(config, report=progress) as orchestrator:
            progress.close()
            app = create_app(orchestrator, tokenizer, service_config)
            server = make_server(
                app, host=arguments.host, port=arguments.port, log_level=arguments.log_level, drain_s=arguments.drain_s
            )
            err.print(
                f"workers connect to {orchestrator.endpoint}" if config.listen else "workers are ready", soft_wrap=True
            )
            err.print(f"serving {service_config.model} at http://{arguments.host}:{arguments.port}/v1", soft_wrap=True)
            await server.serve()
    return 0 if server.started else 1


def _api_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        words = os.environ.get(_KEYS_VARIABLE, "").split(",")
    else:
        try:
            words = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read --api-keys {path}: {error.strerror}") from None
    keys = tuple(word.strip() for word in words if word.strip())
    if path is not None and not keys:
        raise ConfigError(f"--api-keys {path} holds no key: write one in each line")
    return keys
