"""The examples of embedding, as their first lines say to run them, with a small model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.engines import make_byte_model
from support.patience import limit_s

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("bytes"))


def said(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, encoding="utf-8", check=False, timeout=limit_s(120)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embed(model: Path) -> None:
    assert len(said(EXAMPLES / "embed.py", "Why?", model)) > 1


def test_without_asyncio(model: Path) -> None:
    *_, form = said(EXAMPLES / "without_asyncio.py", model).splitlines()
    assert form in ("yes", "no")
