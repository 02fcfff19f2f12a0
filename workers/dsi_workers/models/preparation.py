"""`python -m dsi_workers.models.preparation REF`: fetch or convert a model in a separate process.

The parent process can do other work meanwhile. This process writes its progress to standard output, as one JSON object per
line: {"what", "done", "detail"} (see Report). The last line is {"directory"} or {"error"}. It exits when its standard input is
closed, as when the parent process ends.
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
    parser.add_argument("--tokenizer-only", action="store_true", help="do not fetch the weights")
    parser.add_argument("--adapter", metavar="DIR", default="", help="merge this LoRA adapter into the model")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # no progress bars of libraries
    sys.stdout = sys.stderr  # libraries may print; standard output is for JSON lines
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def report(what: str, done: float | None, detail: str) -> None:
        _write_line(what=what, done=done, detail=detail)

    try:
        directory = resolve_model(
            arguments.reference, adapter=arguments.adapter, tokenizer_only=arguments.tokenizer_only, report=report
        )
    except ModelError as error:
        _write_line(error=str(error))
        os._exit(1)  # without waiting for fetches of other files: the next run continues them
    _write_line(directory=str(directory))


def _write_line(**line: object) -> None:
    assert sys.__stdout__ is not None
    sys.__stdout__.write(json.dumps(line) + "\n")
    sys.__stdout__.flush()


def _exit_with_parent() -> None:
    """Exit when standard input is closed."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
