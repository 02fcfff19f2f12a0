"""Test support: packages that bring engines, installed into directories that tests put on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom-engine"


def install_example(directory: Path) -> Path:
    """Build examples/custom-engine and install it, as pip does. Needs no network. Returns the directory for the path."""
    source, site = directory / "source", directory / "site"
    shutil.copytree(EXAMPLE, source)  # a build leaves files beside the source
    words = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, "--target", site, source], check=True)
    return site


def write_package(site: Path, name: str, engines: dict[str, str], code: str = "") -> None:
    """An installed package `name` with this code, whose engines are at these places, such as {"fast": "module:factory"}."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = "".join(f"{engine} = {place}\n" for engine, place in engines.items())
    (metadata / "entry_points.txt").write_text(f"[dsi_workers.engines]\n{points}")
    (site / f"{name}.py").write_text(code)


def put_on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process, and for those that it starts."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
