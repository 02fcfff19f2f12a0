"""`dsi-actors trace FILE`: a recorded generation as a picture. Record one with `dsi-actors generate ... --record FILE`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dsi_actors.console.machine import describe_machine
from dsi_actors.console.options import SubParsers, add_json_option, add_logging_option
from dsi_actors.errors import ConfigError
from dsi_actors.tracing.chrome import chrome_trace
from dsi_actors.tracing.lanes import draw
from dsi_actors.tracing.page import html_page
from dsi_actors.tracing.record import read_recording


def add_parser(commands: SubParsers) -> None:
    parser = commands.add_parser("trace", help="one generation as a picture", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="what --record wrote")
    parser.add_argument("--html", metavar="OUT", help="a page that needs nothing else (default: FILE.html)")
    parser.add_argument("--chrome", metavar="OUT", help="a trace for chrome://tracing and ui.perfetto.dev")
    parser.add_argument("--generation", type=int, metavar="N", help="which one, if several were recorded")
    add_json_option(parser)
    add_logging_option(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    recording = read_recording(arguments.file)
    known = sorted({moment.generation for moment in recording.moments})
    if arguments.generation not in (None, *known):
        raise ConfigError(f"there is no generation {arguments.generation} in {arguments.file}: it has {known}")
    page = arguments.html or f"{arguments.file}.html"
    _check_names(arguments.file, page, arguments.chrome)
    picture = draw(recording, arguments.generation)
    outputs = {page: html_page(picture, f"A generation of {len(picture.accepted)} tokens")}
    if arguments.chrome:
        outputs[arguments.chrome] = json.dumps(chrome_trace(picture))
    for path, content in outputs.items():
        _write(path, content)
        if not arguments.json:
            sys.stdout.write(f"{path}\n")
    if arguments.json:
        result = {"files": list(outputs), "tokens": len(picture.accepted), "accepted": sum(picture.accepted)}
        sys.stdout.write(json.dumps({"machine": describe_machine(), "results": [result]}) + "\n")
    return 0


def _check_names(recording: str, page: str, chrome: str | None) -> None:
    """One of them must not take the place of another. Raises ConfigError."""
    outputs = {"--html": page, **({"--chrome": chrome} if chrome else {})}
    for option, path in outputs.items():
        if os.path.realpath(path) == os.path.realpath(recording):
            raise ConfigError(f"{option} {path} is the recording itself: give another name")
    if chrome and os.path.realpath(page) == os.path.realpath(chrome):
        raise ConfigError(f"--html and --chrome are the same file {page}: give two names")


def _write(path: str, content: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
