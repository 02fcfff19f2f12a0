"""`dsi-actors`: the command line. Results go to standard output, logs and progress to standard error."""

from __future__ import annotations

import argparse
import errno
import signal
import sys

from dsi_actors import benches
from dsi_actors.cli import chaos, conformance, download, generate, keys, plan, serve, simulate, status, trace
from dsi_actors.console.machine import version_of
from dsi_actors.console.options import Parser, add_group
from dsi_actors.console.running import EndedBySignal, run
from dsi_actors.errors import DsiError
from dsi_actors.host.standard_streams import complain, forget_output, prepare_streams
from dsi_actors.logs import show_logs


def main() -> int:
    prepare_streams()
    try:
        status = _run()
        sys.stdout.flush()
        return status
    except DsiError as error:
        complain(f"dsi-actors: {error}")
        return 1
    except EndedBySignal as ended:
        complain("\ndsi-actors: interrupted" if ended.number == signal.SIGINT else f"dsi-actors: ended by {ended}")
        return ended.status
    except BrokenPipeError:  # `dsi-actors ... | head`: it has read what it wanted
        forget_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        complain(f"dsi-actors: cannot write: {error.strerror}")
        forget_output()
        return 1


def _run() -> int:
    try:
        arguments = _parser().parse_args()
    except SystemExit as ended:  # it has shown its help, or what is wrong
        return int(ended.code or 0)
    show_logs(arguments.log_level, arguments.log_format)
    return run(arguments.command, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="dsi-actors", description="Distributed speculative inference.")
    parser.add_argument(
        "--version", action="version", version=f"dsi-actors {version_of('dsi-actors') or 'not installed'}"
    )
    commands = add_group(parser, "commands", "COMMAND")
    generate.add_parser(commands)
    serve.add_parser(commands)
    download.add_parser(commands)
    status.add_parser(commands)
    plan.add_parser(commands)
    simulate.add_parser(commands)
    trace.add_parser(commands)
    keys.add_parser(commands)
    chaos.add_parser(commands)
    conformance.add_parser(commands)
    benches.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
