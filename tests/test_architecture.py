"""The import arrows and the purity of the core, read from the source; and what an orchestrator host must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsi_actors
import dsi_protocol
import dsi_workers

PACKAGES = {
    module.__name__: Path(module.__file__).parent
    for module in (dsi_actors, dsi_protocol, dsi_workers)
    if module.__file__ is not None
}


def imports_of(path: Path) -> set[str]:
    """Top-level names of everything that the file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def files(package: str, folder: str = "") -> list[Path]:
    found = sorted((PACKAGES[package] / folder).rglob("*.py"))
    assert found
    return found


def test_the_protocol_imports_neither_other_package_and_needs_msgpack_only() -> None:
    for path in files("dsi_protocol"):
        outside = imports_of(path) - set(sys.stdlib_module_names) - {"dsi_protocol"}
        assert outside <= {"msgpack"}, path


def test_workers_import_the_protocol_only() -> None:
    for path in files("dsi_workers"):
        assert "dsi_actors" not in imports_of(path), path


def test_only_the_entry_point_starts_workers() -> None:
    for path in files("dsi_actors"):
        if path != PACKAGES["dsi_actors"] / "worker.py":
            assert "dsi_workers" not in imports_of(path), path


def test_the_core_is_pure() -> None:
    allowed = {"__future__", "collections", "dataclasses", "typing", "dsi_actors", "enum", "math"}
    for path in files("dsi_actors", "core"):
        assert imports_of(path) <= allowed, path
        source = ast.parse(path.read_text(encoding="utf-8"))
        inner = {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.module}
        assert all(not name.startswith("dsi_actors") or name.startswith("dsi_actors.core") for name in inner), path


def test_only_the_gateway_knows_zmq() -> None:
    users = {path.name for path in files("dsi_actors") if "zmq" in imports_of(path)}
    assert users == {"gateway.py", "keys.py", "proxy.py", "strangers.py", "bench_overhead.py"}


def test_no_module_outgrows_one_idea() -> None:
    for package in PACKAGES:
        for path in files(package):
            limit = 600 if "core" in path.parts else 400
            assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path


@pytest.mark.parametrize(
    "program",
    [
        "import dsi_actors, dsi_actors.tokenizer, dsi_actors.cli.main",
        "import dsi_actors.serving.app",
        "import dsi_workers.main, dsi_workers.engines, dsi_workers.models, dsi_workers.loop",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(program: str) -> None:
    check = f"{program}\nimport sys\nsys.exit(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
