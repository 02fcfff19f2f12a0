"""`dsi-actors keys`: keys for workers on other machines. One file per worker; revoking one takes effect within a second."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_group, add_json_option, add_logging_option
from dsi_actors.keys import Keyring, new_keys, revoke


def add_parser(commands: SubParsers) -> None:
    keys = commands.add_parser("keys", help="keys for workers on other machines", description=__doc__)
    actions = add_group(keys, "actions", "ACTION")
    new = actions.add_parser("new", help="make a key for each NAME, and the orchestrator's own if there is none")
    new.add_argument("directory", metavar="DIRECTORY", type=Path)
    new.add_argument("names", metavar="NAME", nargs="+")
    new.set_defaults(command=_new)
    listing = actions.add_parser("list", help="whose keys are allowed")
    listing.add_argument("directory", metavar="DIRECTORY", type=Path)
    add_json_option(listing)
    listing.set_defaults(command=_list)
    revoking = actions.add_parser("revoke", help="the worker NAME is not heard any more")
    revoking.add_argument("directory", metavar="DIRECTORY", type=Path)
    revoking.add_argument("name", metavar="NAME")
    revoking.set_defaults(command=_revoke)
    for parser in (new, listing, revoking):
        add_logging_option(parser)


def _new(arguments: argparse.Namespace) -> int:
    for path in new_keys(arguments.directory, arguments.names):
        sys.stdout.write(f"{path}\n")
    sys.stderr.write(
        f"Listen with --keys {arguments.directory}; carry each of these files to its worker's machine and start the "
        "worker with --key FILE.\n"
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    allowed = sorted(Keyring(arguments.directory).allowed.items(), key=lambda item: item[1])
    if arguments.json:
        results = [{"name": name, "public_key": public} for public, name in allowed]
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": results}) + "\n")
        return 0
    for public, name in allowed:
        sys.stdout.write(f"{name}  {public}\n")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    revoke(arguments.directory, arguments.name)
    return 0
