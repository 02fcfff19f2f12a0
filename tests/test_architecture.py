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

#: Each folder, or module beside the folders, may import those that stand before it (docs/architecture.md).
LAYERS = {
    "dsi_actors": (
        "errors logs host structure config engine_options keys progress results core observation actor stream planning "
        "arguments tokenization tokenizer text text_stream models transport workforce launching supervision generation root "
        "local_workers orchestrator blocking __init__ percentiles simulation tracing serving chaos conformance console benches "
        "worker cli"
    ),
    "dsi_workers": (
        "__init__ tree draft_tree session sessions engine backend grammar logit_changes sampling connection models decoding "
        "checkpoints group drafting llama engines benches refusal work loop prepare_models main"
    ),
    "dsi_protocol": "errors checksums fields sampling gumbel messages codec endpoints __init__",
}
#: One idea each, so that a module can be read in one sitting.
MOST_LINES = 400
MOST_LINES_OF_THE_CORE = 600


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that the file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            inside = node.module in PACKAGES  # `from dsi_actors import benches` names a folder
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return found


def packages_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def files(package: str, folder: str = "") -> list[Path]:
    found = sorted((PACKAGES[package] / folder).rglob("*.py"))
    assert found
    return found


def part_of(package: str, path: Path) -> str:
    """The folder that a module stands in, or its own name beside the folders."""
    return path.relative_to(PACKAGES[package]).with_suffix("").parts[0]


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_arrow_runs_up(package: str) -> None:
    layers = LAYERS[package].split()
    assert {part_of(package, path) for path in files(package)} <= set(layers), "a new folder needs its place"
    for path in files(package):
        own = part_of(package, path)
        for name in imports_of(path):
            if name.partition(".")[0] != package or own == "__init__":
                continue
            parts = name.split(".")
            other = parts[1] if parts[1] in layers else "__init__"
            assert layers.index(other) <= layers.index(own), f"{path} imports {name}"


def test_the_protocol_imports_neither_other_package_and_needs_msgpack_only() -> None:
    for path in files("dsi_protocol"):
        outside = packages_of(path) - set(sys.stdlib_module_names) - {"dsi_protocol"}
        assert outside <= {"msgpack"}, path


def test_workers_import_the_protocol_only() -> None:
    for path in files("dsi_workers"):
        assert "dsi_actors" not in packages_of(path), path


def test_only_the_entry_point_starts_workers() -> None:
    for path in files("dsi_actors"):
        if path != PACKAGES["dsi_actors"] / "worker.py":
            assert "dsi_workers" not in packages_of(path), path


def test_the_core_is_pure() -> None:
    allowed = {"__future__", "collections", "dataclasses", "typing", "dsi_actors", "enum", "math"}
    for path in files("dsi_actors", "core"):
        assert packages_of(path) <= allowed, path
        inside = {name for name in imports_of(path) if name.startswith("dsi_actors")}
        assert all(name.startswith("dsi_actors.core") for name in inside), path


def test_only_the_transport_knows_zmq() -> None:
    """And those that speak to it as strangers do, or measure what it costs."""
    users = {path.relative_to(PACKAGES["dsi_actors"]) for path in files("dsi_actors") if "zmq" in packages_of(path)}
    assert {str(path) for path in users} == {
        "transport/gateway.py", "transport/contexts.py", "keys.py", "chaos/proxy.py", "chaos/strangers.py", "benches/overhead.py"
    }  # fmt: skip


def test_no_module_outgrows_one_idea() -> None:
    """Lines of code and prose that are not blank: what a reader has to take in."""
    for package in PACKAGES:
        for path in files(package):
            limit = MOST_LINES_OF_THE_CORE if part_of(package, path) == "core" else MOST_LINES
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            assert len(lines) <= limit, path


def test_each_folder_says_what_it_holds() -> None:
    for package in PACKAGES:
        for path in files(package):
            assert path.stat().st_size == 0 or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
            assert path.name != "__init__.py" or path.stat().st_size > 0, path


@pytest.mark.parametrize(
    "program",
    [
        "import dsi_actors, dsi_actors.tokenizer, dsi_actors.cli.main",
        "import dsi_actors.serving.app",
        "import dsi_workers.main, dsi_workers.engines, dsi_workers.models.resolve, dsi_workers.loop, dsi_workers.backend",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(program: str) -> None:
    check = f"{program}\nimport sys\nsys.exit(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_worker_imports_nothing_of_the_orchestrator() -> None:
    """Each worker is a process of its own, and what it imports is part of every start."""
    check = (
        "import sys, dsi_actors.worker, dsi_workers.main\n"
        "sys.exit(sorted({'uvloop', 'rich.live', 'dsi_actors.core', 'dsi_actors.orchestrator'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
