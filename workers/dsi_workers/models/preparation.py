"""`python -m dsi_workers.models.preparation REF`: fetch or convert a model in a process of its own, so that its parent goes on.

It says what it does on standard output, one JSON object in each line: {"what", "done", "detail"} as a Report, at the end
{"directory"} or {"error"}. It ends when its standard input is closed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading

from dsi_workers.models.files import ModelError
from dsi_workers.models.resolve import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsi_workers.models.preparation", description=__doc__)
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("--tokenizer-only", action="store_true", help="the weights are not needed")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # libraries draw bars of their own
    sys.stdout = sys.stderr  # and may print
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(what: str, done: float | None, detail: str) -> None:
        _say(what=what, done=done, detail=detail)

    try:
        directory = resolve_model(arguments.reference, tokenizer_only=arguments.tokenizer_only, report=report)
    except ModelError as error:
        _say(error=str(error))
        os._exit(1)  # what else is being fetched is not waited for: the next run goes on there
    _say(directory=str(directory))


def _say(**line: object) -> None:
    assert sys.__stdout__ is not None
    sys.__stdout__.write(json.dumps(line) + "\n")
    sys.__stdout__.flush()


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
