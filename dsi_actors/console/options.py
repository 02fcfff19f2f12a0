"""Options that several commands share, and how they become a Config. Defaults are read from the Config itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any, Literal, TypeAlias

from dsi_actors.config import ALGORITHMS, Config, Sampling
from dsi_actors.engine_options import KNOWN, read_settings
from dsi_actors.errors import ConfigError
from dsi_actors.host.engine_choice import fastest_engine
from dsi_actors.host.requirements import require
from dsi_protocol import OptionValue

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def default_of(settings: type[Any], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(settings) if field.name == name)


class Parser(argparse.ArgumentParser):
    """Says each option's default in its help, and shows help in the words of the caller's terminal."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Help, **settings})


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        silent = action.default is None or isinstance(action.default, bool) or action.default in (argparse.SUPPRESS, [])
        if silent or not action.option_strings or "default" in text:
            return text
        return f"{text} (default %(default)s)"


def add_group(parser: argparse.ArgumentParser, title: str, metavar: str) -> SubParsers:
    """Commands of `parser`. Without any of them it shows its help."""

    def show_help(_: argparse.Namespace) -> int:
        parser.print_help(sys.stdout)
        return 0

    parser.set_defaults(
        command=show_help, log_level=default_of(Config, "log_level"), log_format=default_of(Config, "log_format")
    )
    return parser.add_subparsers(title=title, metavar=metavar)


def add_logging_option(parser: argparse.ArgumentParser) -> None:
    levels = ["debug", "info", "warning", "error"]
    parser.add_argument(
        "--log-level", choices=levels, default=default_of(Config, "log_level"), help="of what goes to standard error"
    )
    parser.add_argument(
        "--log-format", choices=["text", "json"], default=default_of(Config, "log_format"),
        help="lines of text, or one JSON object in each line",
    )  # fmt: skip


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object: the machine, and results")


def add_target_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default=default_of(Config, "target"), metavar="REF",
        help="the model: a directory, a .gguf file, package:NAME or a hub name (default %(default)s)",
    )  # fmt: skip


def add_drafter_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drafter", default=default_of(Config, "drafter"), metavar="REF",
        help="the drafter: self-int8, self-int4, ngram, or a model (default %(default)s)",
    )  # fmt: skip


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """Which models run where."""
    add_target_option(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", help="the directory of a LoRA adapter, which is merged into the target once"
    )
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="REF", dest="drafters",
        help="self-int8 or self-int4 (the target's own weights in 8 or 4 bits), ngram (prompt lookup), none, or a model, of "
        "another vocabulary, too; ngram+REF is the drafter REF, for which prompt lookup guesses; several: each generation takes "
        f"the one that is the fastest for it, or all together (default {default_of(Config, 'drafter')})",
    )  # fmt: skip
    parser.add_argument(
        "--sp", type=int, metavar="N",
        help="target servers that verify at the same time (default: one for each GPU, or core, that the drafter leaves)",
    )  # fmt: skip
    add_device_options(parser)
    parser.add_argument(
        "--engine", default=default_of(Config, "engine"), metavar="NAME",
        help="what runs the models: transformers; llama-cpp, for GGUF files on a CPU; auto, the fastest of these here; or an "
        "engine that an installed package brings (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="numbers that targets compute with; auto: bfloat16 on a GPU, float32 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--window",
        type=int,
        metavar="W",
        help="positions in one verification forward (default: 32 on a GPU, 8 on a CPU)",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="L",
        help="positions that a generation may have (default: as many as the model allows and memory holds)",
    )  # fmt: skip
    parser.add_argument(
        "--slots", type=int, metavar="N",
        help="generations that a worker serves side by side (default: 8, on a GPU as many as its memory holds, at most 64)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="ROLE.KEY=VALUE", dest="settings",
        help="any option of the engine, such as target.kernels=false or drafter.quantization=none; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--no-calibration", action="store_false", dest="calibrate",
        help="do not measure latencies at the start: the first tokens come by plain decoding, and teach them",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="T", help="torch threads of each worker (default 1)")
    add_ready_timeout_option(parser)
    add_logging_option(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", action="extend", type=lambda text: text.split(","), default=[], metavar="LIST", dest="devices",
        help="devices of the local workers, in turn, such as 0,1 or cpu; may be repeated (default: all CUDA devices, else cpu)",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="the first N CUDA devices: the same as --gpu 0,...,N-1")
    parser.add_argument(
        "--tp", type=int, default=default_of(Config, "tp"), metavar="N",
        help="devices of each target server, which divide the model among them (tensor parallelism; default %(default)s)",
    )  # fmt: skip


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", choices=["local", "ray"], default=default_of(Config, "cluster"),
        help="where to start workers: on this machine, or on a Ray cluster, which chooses a GPU for each",
    )  # fmt: skip
    parser.add_argument(
        "--ray-address",
        metavar="A",
        help="with --cluster ray: of the cluster (default: the one that runs on this machine)",
    )


def devices_from(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Raises ConfigError."""
    if arguments.gpus is None:
        return tuple(arguments.devices)
    if arguments.devices:
        raise ConfigError("--gpus and --gpu both say where workers run: give one of them")
    if not 1 <= arguments.gpus <= 64:
        raise ConfigError(
            f"--gpus {arguments.gpus}: give a number from 1 to 64, or the devices themselves with --gpu 0,1"
        )
    return tuple(str(number) for number in range(arguments.gpus))


def add_ready_timeout_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready-timeout", type=float, default=default_of(Config, "ready_timeout_s"), metavar="S",
        help="how long a worker may take to load its model, once that is on its machine (default %(default)s)",
    )  # fmt: skip


def add_algorithm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="dsi",
        help="ar: plain decoding; si: speculative inference; dsi: distributed speculative inference",
    )  # fmt: skip
    parser.add_argument(
        "--lookahead", type=lookahead, default="auto", metavar="auto|K",
        help="drafted tokens between two verifications; auto chooses from measured latencies and acceptance",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=rows, default="auto", metavar="auto|R",
        help="the most rows of a drafting step: one for the main path, the others for branches; 1 drafts chains; auto lets the "
        "planner choose",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=default_of(Sampling, "max_tokens"), metavar="N", help="of the answer"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Names and defaults are those of `Sampling`, which checks them. Those of all but the seed are the model's own, if it has
    some."""
    helps = {
        "temperature": ("T", "0 takes the most probable token; higher values draw more freely"),
        "top_k": ("K", "keep the K most probable tokens"),
        "top_p": ("P", "keep the most probable tokens that together have this probability"),
        "min_p": ("P", "keep tokens with at least this share of the most probable token's probability"),
        "repetition_penalty": ("R", "above 1, tokens that were there before become less probable"),
    }
    penalties = {
        "presence_penalty": "subtracted from the logits of tokens that the answer has",
        "frequency_penalty": "subtracted from the logit of a token for each time that the answer has it",
    }
    for name, (metavar, text) in helps.items():
        otherwise = "all" if name == "top_k" else f"{default_of(Sampling, name):g}"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int if name == "top_k" else float, metavar=metavar,
            help=f"{text} (default: what the model's generation_config.json says, else {otherwise})",
        )  # fmt: skip
    for name, text in penalties.items():
        otherwise = f"{default_of(Sampling, name):g}"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, metavar="P", help=f"{text} (default: {otherwise})"
        )
    parser.add_argument("--min-tokens", type=int, metavar="N", help="the answer does not end before it has N tokens")
    parser.add_argument(
        "--seed", type=int, metavar="S", default=default_of(Sampling, "seed"), help="the same seed gives the same text"
    )


def sampling_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the user gave, by their names in `Sampling`."""
    names = (
        "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "min_tokens", "seed",
    )  # fmt: skip
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


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


def _engine_from(arguments: argparse.Namespace, *, elsewhere: bool) -> str:
    """The engine's name. With auto, says on standard error which one is taken and why."""
    if arguments.engine != "auto":
        return str(arguments.engine)
    name, reason = fastest_engine(arguments.target, devices_from(arguments), elsewhere=elsewhere)
    sys.stderr.write(f"--engine auto takes {name}: {reason}\n")
    return name


def config_from(
    arguments: argparse.Namespace, *, listen: str | None = None, insecure: bool = False, keys: str | None = None,
    max_generations: int = default_of(Config, "max_generations"), target_servers: tuple[int, int] | None = None,
    shrink_after_s: float = default_of(Config, "shrink_after_s"),
) -> Config:  # fmt: skip
    """Raises ConfigError."""
    engine: dict[str, OptionValue] = {
        name: value
        for name in ("window", "max_length", "slots", "threads")
        if (value := getattr(arguments, name)) is not None
    }
    name = _engine_from(arguments, elsewhere=listen is not None or arguments.cluster != "local")
    settings = read_settings(arguments.settings, name)
    adapter: dict[str, OptionValue] = {} if arguments.adapter is None else {"adapter": arguments.adapter}
    if adapter and "adapter" not in KNOWN.get(name, adapter):
        raise ConfigError(f"--adapter: the engine {name} has no weights to merge an adapter into: leave it out")
    if arguments.cluster == "ray":
        require("a Ray cluster", "ray")
    return Config(
        target=arguments.target,
        drafter=_drafters(arguments.drafters),
        sp=arguments.sp,
        devices=devices_from(arguments),
        cluster=arguments.cluster,
        ray_address=arguments.ray_address,
        tp=arguments.tp,
        listen=listen,
        insecure=insecure,
        keys=keys,
        max_generations=max_generations,
        target_servers=target_servers,
        shrink_after_s=shrink_after_s,
        engine=name,
        target_options={**engine, "dtype": arguments.dtype, **adapter, **settings["target"]},
        drafter_options={**engine, **settings["drafter"]},
        calibrate=arguments.calibrate,
        ready_timeout_s=arguments.ready_timeout,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
    )
