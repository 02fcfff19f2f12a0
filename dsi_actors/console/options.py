"""Options that several commands share, and how they become a Config. Defaults are read from the Config itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any, Literal, TypeAlias

from dsi_actors.config import ALGORITHMS, Config, Sampling
from dsi_actors.errors import ConfigError
from dsi_protocol import OptionValue

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def default_of(settings: type[Any], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(settings) if field.name == name)


def add_group(parser: argparse.ArgumentParser, title: str, metavar: str) -> SubParsers:
    """Commands of `parser`. Without any of them it shows its help."""

    def show_help(_: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return 2

    parser.set_defaults(
        command=show_help, log_level=default_of(Config, "log_level"), log_format=default_of(Config, "log_format")
    )
    return parser.add_subparsers(title=title, metavar=metavar)


def add_logging_option(parser: argparse.ArgumentParser) -> None:
    levels = ["debug", "info", "warning", "error"]
    parser.add_argument("--log-level", choices=levels, default=default_of(Config, "log_level"))
    parser.add_argument("--log-format", choices=["text", "json"], default=default_of(Config, "log_format"))


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Which models run where."""
    parser.add_argument(
        "--target", default=default_of(Config, "target"), metavar="REF",
        help="the model: a directory, a .gguf file, package:NAME or a hub name (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="REF", dest="drafters",
        help="self-int8 (the target's own weights in int8), ngram (prompt lookup), none, or a model, of another "
        "vocabulary, too; ngram+REF is the drafter REF, for which prompt lookup guesses; several: each generation takes "
        f"the one that is the fastest for it (default {default_of(Config, 'drafter')})",
    )  # fmt: skip
    parser.add_argument(
        "--sp", type=int, metavar="N",
        help="target servers that verify at the same time (default: one for each GPU, or core, that the drafter leaves)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", action="append", default=[], metavar="N", dest="devices",
        help="device of the local workers, in turn; may be repeated; cpu is one (default: all CUDA devices, else cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", default=default_of(Config, "engine"), metavar="NAME",
        help="what runs the models: transformers, or an engine that an installed package brings (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--window", type=int, metavar="W", help="positions in one verification forward")
    parser.add_argument("--max-length", type=int, metavar="L", help="positions that a generation may have")
    parser.add_argument(
        "--no-calibration", action="store_false", dest="calibrate",
        help="do not measure latencies at the start: the first tokens come by plain decoding, and teach them",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="T", help="torch threads of each worker (default 1)")
    add_ready_timeout_option(parser)
    add_logging_option(parser)


def add_ready_timeout_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready-timeout", type=float, default=default_of(Config, "ready_timeout_s"), metavar="S",
        help="how long a worker may take to load its model, once that is on its machine (default %(default)s)",
    )  # fmt: skip


def add_algorithm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="dsi")
    parser.add_argument("--lookahead", type=lookahead, default="auto", metavar="auto|K")
    parser.add_argument(
        "--rows", type=rows, default="auto", metavar="auto|R",
        help="the most rows of a drafting step: one for the main path, the others for branches; 1 drafts chains; auto lets the "
        "planner choose (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=default_of(Sampling, "max_tokens"), metavar="N")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Names and defaults are those of `Sampling`, which checks them."""
    parser.add_argument("--temperature", type=float, default=default_of(Sampling, "temperature"), metavar="T")
    parser.add_argument("--top-k", type=int, default=default_of(Sampling, "top_k"), metavar="K")
    parser.add_argument("--top-p", type=float, default=default_of(Sampling, "top_p"), metavar="P")
    parser.add_argument("--min-p", type=float, default=default_of(Sampling, "min_p"), metavar="P")
    parser.add_argument(
        "--repetition-penalty", type=float, default=default_of(Sampling, "repetition_penalty"), metavar="R"
    )
    parser.add_argument("--seed", type=int, default=default_of(Sampling, "seed"), metavar="S")


def sampling_from(arguments: argparse.Namespace, **more: Any) -> Sampling:
    """Raises ConfigError."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(arguments, name) for name in names}, **more)


def lookahead(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _at_least_1(text)


def rows(text: str) -> int | None:
    """None: the planner chooses."""
    return None if text == "auto" else _at_least_1(text)


def _at_least_1(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give auto or a whole number of at least 1")


def utf8(argument: str) -> str:
    """An argument that is text, not the name of a file: bytes that the locale does not know are UTF-8."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{argument!r} is no UTF-8") from None


def _drafters(references: list[str]) -> tuple[str, ...] | str | None:
    """Raises ConfigError."""
    if references == ["none"]:
        return None
    if "none" in references:
        raise ConfigError("--drafter none goes with no other drafter: leave one out")
    default: str = default_of(Config, "drafter")
    return tuple(references) or default


def config_from(
    arguments: argparse.Namespace, *, listen: str | None = None, insecure: bool = False, keys: str | None = None,
    max_generations: int = default_of(Config, "max_generations"),
) -> Config:  # fmt: skip
    """Raises ConfigError."""
    engine: dict[str, OptionValue] = {
        name: value for name in ("window", "max_length", "threads") if (value := getattr(arguments, name)) is not None
    }
    return Config(
        target=arguments.target,
        drafter=_drafters(arguments.drafters),
        sp=arguments.sp,
        devices=tuple(arguments.devices),
        listen=listen,
        insecure=insecure,
        keys=keys,
        max_generations=max_generations,
        engine=arguments.engine,
        target_options={**engine, "dtype": arguments.dtype},
        drafter_options=dict(engine),
        calibrate=arguments.calibrate,
        ready_timeout_s=arguments.ready_timeout,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
    )
