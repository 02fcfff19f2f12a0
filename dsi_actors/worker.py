"""`python -m dsi_actors.worker --gpu N`: one worker, on one or several devices. The only module here that starts dsi_workers."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AbstractContextManager

from dsi_actors.errors import ConfigError
from dsi_actors.host.devices import device_name
from dsi_actors.host.standard_streams import complain, prepare_streams
from dsi_actors.keys import load_worker_key
from dsi_actors.launching.launcher import INCARNATION_VARIABLE
from dsi_actors.logs import show_logs
from dsi_actors.progress import Report

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
_DESCRIPTION = "One worker: a drafter or a target server, on one device or on several that compute together."


def main() -> int:
    prepare_streams()
    arguments = _parser().parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # libraries draw bars of their own
    try:
        return _work(arguments)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsi_actors.worker", description=_DESCRIPTION)
    parser.add_argument(
        "--gpu",
        type=_device,
        metavar="N",
        required=True,
        help="CUDA device number, or cpu, cpu:0, cpu:1, ...; several, such as 0,1, compute each forward together",
    )
    parser.add_argument("--connect", default=DEFAULT_ENDPOINT, help="the orchestrator (default %(default)s)")
    parser.add_argument(
        "--role", choices=["auto", "target", "drafter"], default="auto", help="auto (default): the orchestrator decides"
    )
    parser.add_argument(
        "--engine", type=_engine, default="auto", metavar="NAME",
        help="auto (the orchestrator decides), transformers, llama-cpp, timed, ngram, or one that an installed package brings",
    )  # fmt: skip
    parser.add_argument("--model", default="", metavar="REF", help="directory, .gguf file, package:NAME or hub name")
    parser.add_argument(
        "--adapter", default="", metavar="DIR",
        help="the directory of a LoRA adapter, which is merged into this worker's model (default: what the orchestrator names)",
    )  # fmt: skip
    parser.add_argument("--key", metavar="FILE", help="the key that dsi-actors keys new made for this worker")
    parser.add_argument(
        "--once", action="store_true", help="end with the orchestrator, instead of waiting for the next one"
    )
    parser.add_argument("--supervised", action="store_true", help="exit when standard input closes")
    parser.add_argument(
        "--no-fetch", action="store_false", dest="fetches_models", help="the models are on this machine: fetch nothing"
    )
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info", help="default %(default)s"
    )
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="default %(default)s")
    return parser


def _work(arguments: argparse.Namespace) -> int:
    from dsi_workers.connection import CurveKeys
    from dsi_workers.main import OtherEngineWanted, WorkerConfig, WorkerError, run_worker

    show_logs(arguments.log_level, arguments.log_format)
    incarnation = os.environ.get(INCARNATION_VARIABLE, "") if arguments.supervised else ""
    try:
        keys = None if arguments.key is None else CurveKeys(*load_worker_key(arguments.key))
    except ConfigError as error:
        complain(f"worker: {error}")
        return 1
    config = WorkerConfig(
        endpoint=arguments.connect,
        device=arguments.gpu,
        role=arguments.role,
        engine=arguments.engine,
        model=arguments.model,
        adapter=arguments.adapter,
        supervised=arguments.supervised,
        fetches_models=arguments.fetches_models,
        once=arguments.once,
        incarnation=int(incarnation) if incarnation else None,
        keys=keys,
        progress=_shown,
    )
    try:
        run_worker(config)
    except WorkerError as error:
        complain(f"worker: {error}")
        return 1
    except OtherEngineWanted:
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return 0


def _shown() -> AbstractContextManager[Report]:
    from dsi_actors.console.progress import (
        ShownProgress,  # which imports what a worker with nothing to fetch does not need
    )

    return ShownProgress()


def _device(text: str) -> str:
    try:
        return ",".join(map(device_name, text.split(",")))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _engine(text: str) -> str:
    if text == "auto":
        return text
    from dsi_workers.engines import EngineError, check_known

    try:
        check_known(text)
    except EngineError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


if __name__ == "__main__":
    sys.exit(main())
