"""`dsi-actors serve`: an OpenAI-compatible HTTP service on target servers and a drafter."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from dsi_actors.config import Config
from dsi_actors.console.options import (
    SubParsers,
    add_cluster_options,
    add_worker_options,
    config_from,
    default_of,
    utf8,
)
from dsi_actors.console.progress import ShownProgress
from dsi_actors.console.running import Ending
from dsi_actors.console.terminal import terminal
from dsi_actors.errors import ConfigError
from dsi_actors.host.requirements import require_models
from dsi_actors.models import target_tokenizer
from dsi_actors.orchestrator import Orchestrator
from dsi_actors.tokenization.sampling_defaults import described_defaults

_KEYS_VARIABLE = "DSI_API_KEYS"


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("serve", help="OpenAI-compatible HTTP", description=__doc__)
    add_worker_options(parser)
    add_cluster_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="where HTTP listens (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    parser.add_argument(
        "--model-name", type=utf8, metavar="NAME", help="what clients call the model (default: its reference)"
    )
    parser.add_argument(
        "--model-alias", action="append", default=[], type=utf8, metavar="NAME", dest="aliases",
        help="another name for the model; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--api-keys", metavar="FILE", help=f"one key in each line (or separated by commas in ${_KEYS_VARIABLE})"
    )
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN", dest="allowed_origins",
        help="let web pages of this origin, such as https://chat.example.org, ask; may be repeated; '*' lets all pages",
    )  # fmt: skip
    parser.add_argument(
        "--allow-unknown-fields",
        action="store_true",
        help="ignore fields of requests that are not known, instead of 400",
    )
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="generations that may wait or run")
    parser.add_argument(
        "--default-max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of an answer, where a request names none",
    )
    parser.add_argument(
        "--target-servers", type=_least_and_most, metavar="MIN..MAX",
        help="start between so many target servers as generations come and go, such as 2..6 (default: always --sp)",
    )  # fmt: skip
    parser.add_argument(
        "--shrink-after", type=float, default=default_of(Config, "shrink_after_s"), metavar="S",
        help="with --target-servers: seconds with fewer generations before servers are sent away (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--listen", metavar="ENDPOINT", help="use workers that connect here, start none")
    parser.add_argument("--keys", metavar="DIRECTORY", help="with --listen: only workers with a key of dsi-actors keys")
    parser.add_argument("--insecure", action="store_true", help="allow --listen for other machines without keys")
    parser.add_argument(
        "--drain-s", type=float, default=30.0, metavar="S", help="after SIGTERM or Ctrl-C, for requests that run"
    )
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    ending: Ending = arguments.ending
    if not 0 <= arguments.port < 1 << 16 or arguments.default_max_tokens < 1 or not 0 <= arguments.drain_s < 1e9:
        raise ConfigError("--port must be a port, --default-max-tokens at least 1, --drain-s at least 0")
    config = config_from(
        arguments, listen=arguments.listen, insecure=arguments.insecure, keys=arguments.keys,
        max_generations=arguments.max_queue, target_servers=arguments.target_servers, shrink_after_s=arguments.shrink_after,
    )  # fmt: skip
    require_models(config.local_models, "serve", *config.local_extras, what="a service")
    from dsi_actors.serving.address import HttpAddress
    from dsi_actors.serving.app import create_app
    from dsi_actors.serving.server import make_server
    from dsi_actors.serving.service import ServiceConfig

    service_config = ServiceConfig(
        model=arguments.model_name or config.target, aliases=tuple(arguments.aliases), api_keys=_api_keys(arguments.api_keys),
        default_max_tokens=arguments.default_max_tokens, allowed_origins=tuple(arguments.allowed_origins),
        allow_unknown_fields=arguments.allow_unknown_fields,
    )  # fmt: skip
    err = terminal(stderr=True)
    address = HttpAddress(arguments.host, arguments.port)  # what is wrong with it shows before anything is loaded
    if not service_config.api_keys and not _is_loopback(arguments.host):
        err.print(
            f"warning: without --api-keys anybody who reaches {address.url} can use the model, and read "
            "what everybody asks and is answered at /dashboard",
            soft_wrap=True,
        )
    with ShownProgress() as progress:
        tokenizer = await target_tokenizer(config, progress)
        async with Orchestrator(config, report=progress) as orchestrator:
            progress.close()
            app = create_app(orchestrator, tokenizer, service_config)
            server = make_server(app, drain_s=arguments.drain_s)
            ending.drains(server)
            address.listen()
            err.print(
                f"workers connect to {orchestrator.endpoint}" if config.listen else "workers are ready", soft_wrap=True
            )
            if tokenizer.sampling_defaults:
                err.print(
                    f"where a request says nothing: {described_defaults(tokenizer.sampling_defaults)}", soft_wrap=True
                )
            err.print(f"serving {service_config.model} at {address.url}/v1", soft_wrap=True)
            await server.serve(address.sockets)
    return 128 + ending.hurried_by if ending.hurried_by else 0


def _least_and_most(text: str) -> tuple[int, int]:
    least, dots, most = text.partition("..")
    if not dots or not (least.isdecimal() and most.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of numbers, such as 2..6")
    return int(least), int(most)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        words = os.environ.get(_KEYS_VARIABLE, "").split(",")
    else:
        try:
            words = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read --api-keys {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--api-keys {path} is no text: write one key in each line") from None
    keys = tuple(word.strip() for word in words if word.strip())
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError("an API key has characters that no HTTP header carries: use ASCII ones")
    if path is not None and not keys:
        raise ConfigError(f"--api-keys {path} holds no key: write one in each line")
    return keys
