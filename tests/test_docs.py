"""The pages keep up with the code: links, paths, commands, settings, and the worked rejection."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import dsi_actors
from dsi_actors.cli.main import _parser
from dsi_actors.core import GenerationCore, Policy, actions, events
from dsi_actors.tracing.drafts import Came
from dsi_actors.tracing.lanes import draw
from dsi_actors.tracing.record import Moment, read_recording
from test_architecture import LAYERS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "protocol/*.md", "workers/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
#: A path in backticks begins with one of these, from the root of the repository or beside the page.
FOLDERS = "dsi_actors|dsi_workers|dsi_protocol|workers|protocol|tests|docs|examples|vectors"
#: Where the options of each command stand.
TABLES = {"bench": "docs/benchmarks/README.md", "plan": "docs/planning.md", "simulate": "docs/planning.md"}
OPERATIONS = "docs/operations.md"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def tokens_of(text: str) -> Iterator[Token]:
    """All tokens of a page, those of lines of text among them."""
    for token in parsed(text):
        yield token
        yield from token.children or ()


def code_of(text: str) -> set[str]:
    """What stands in backticks within lines of text."""
    return {token.content for token in tokens_of(text) if token.type == "code_inline"}


def rows_of(text: str) -> Iterator[list[set[str]]]:
    """For each cell of each row of a table, what stands in backticks there."""
    row: list[set[str]] | None = None
    for token in parsed(text):
        if token.type == "tr_open":
            row = []
        elif token.type == "tr_close" and row is not None:
            yield row
            row = None
        elif token.type == "inline" and row is not None:
            row.append({child.content for child in token.children or () if child.type == "code_inline"})


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    anchors: set[str] = set()
    for heading, line in itertools.pairwise(tokens_of(text)):
        if heading.type == "heading_open":
            words = "".join(child.content for child in line.children or ())
            anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            anchors.add(anchor if anchor not in anchors else f"{anchor}-1")
    return anchors


def commands_of(text: str) -> Iterator[list[str]]:
    """The words after `dsi-actors` in each such command of the page's blocks of code."""
    blocks = [token.content for token in tokens_of(text) if token.type in ("fence", "code_block") and not token.info]
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith("dsi-actors "):
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for separator, command in itertools.groupby(words, lambda word: bool(re.fullmatch("[&|;<>]+", word))):
                program, *rest = command
                if not separator and program == "dsi-actors":
                    yield rest


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    for token in tokens_of(read(page)):
        link = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not link or re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page: str) -> None:
    for code in code_of(read(page)):
        if re.fullmatch(rf"({FOLDERS})/[\w./-]*", code):
            assert (ROOT / code).exists() or ((ROOT / page).parent / code).exists(), f"{page} names {code}"
        elif re.fullmatch(r"dsi_(actors|workers|protocol)(\.\w+)+(\(\))?", code):
            pkgutil.resolve_name(code.removesuffix("()"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_typed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`dsi-actors ...` in a block of code is understood as it stands."""
    for words in commands_of(read(page)):
        try:
            _parser().parse_args(words)
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{page}: dsi-actors {shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_python_can_be_compiled(page: str) -> None:
    for token in tokens_of(read(page)):
        if token.type == "fence" and token.info == "python":
            compile(token.content, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_option_of_a_text_is_in_a_table() -> None:
    options = set(dsi_actors.TextOptions.__annotations__) - {
        field.name for field in dataclasses.fields(dsi_actors.Sampling)
    }
    assert options == set().union(*(row[0] for row in rows_of(read("docs/quickstart.md")) if row)) & options


def test_pages_that_the_code_names_exist() -> None:
    gone = [
        f"{path.relative_to(ROOT)}: {page}"
        for folder in ("dsi_actors", "workers", "protocol", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    ]
    assert not gone


def test_each_setting_is_in_the_tables() -> None:
    service = pkgutil.resolve_name("dsi_actors.serving.service:ServiceConfig")
    first_cells = set().union(*(row[0] for row in rows_of(read(OPERATIONS))))
    for settings in (dsi_actors.Config, dsi_actors.Sampling, service):
        names = {field.name for field in dataclasses.fields(settings)}
        assert names <= first_cells, f"{OPERATIONS} lacks fields of {settings.__name__}"


def commands_in(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, command in group.choices.items():
            yield from commands_in(command, f"{name} {word}".strip())


def test_each_option_is_in_the_tables() -> None:
    for command, parser in commands_in(_parser()):
        page = TABLES.get(command.split()[0], OPERATIONS)
        named = {word for row in rows_of(read(page)) for cell in row for code in cell for word in code.split()}
        options = {option for action in parser._actions for option in action.option_strings}
        everywhere = {"-h", "--help", "--log-level", "--log-format"}
        assert options - everywhere <= named, f"{page} lacks options of dsi-actors {command}"


def test_each_module_has_a_line() -> None:
    pages = {"dsi_actors": "docs/architecture.md", "workers/dsi_workers": "workers/README.md"}
    for package, page in pages.items():
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py":
                continue
            whole = path.relative_to((ROOT / page).parent if page == "workers/README.md" else ROOT).as_posix()
            row = f"| `{path.parent.relative_to(ROOT).as_posix()}/` |"
            lines = [line for line in read(page).splitlines() if line.startswith((row, f"| `{whole}` |"))]
            assert any(f"`{name}`" in line for line in lines for name in (whole, path.name)), f"{page} lacks {whole}"


def test_the_layers_are_those_that_are_tested() -> None:
    for package, layers in LAYERS.items():
        row = f"| `{package}` | {', '.join(layer for layer in layers.split() if layer != '__init__')} |"
        assert row in read("docs/architecture.md").splitlines()


def test_the_worked_rejection_is_what_the_core_does() -> None:
    """docs/concepts.md tells this recording. Fields that it does not name may be added."""
    recording = read_recording(ROOT / "docs/rejection.jsonl")
    core = GenerationCore([0, 10, 20], policy=Policy.distributed(2, sp=2), max_tokens=9)
    told = {moment.name for moment in recording.moments}
    expected: list[Moment] = []
    for moment in recording.moments:
        event = getattr(events, moment.name, None)
        if event is None:
            assert hasattr(actions, moment.name)
            assert moment == expected.pop(0)
            continue
        assert not expected, "an action that the recording does not have"
        values = {name: tuple(each) if isinstance(each, list) else each for name, each in moment.fields.items()}
        done = [action for action in core.handle(event(**values)) if type(action).__name__ in told]
        expected = [_like(moment, action, recording.moments) for action in done]
    assert core.finish_reason == "length"
    assert draw(recording).came.count(Came.OWN) == 2, "the page's command draws it"


def _like(event: Moment, action: Any, recorded: Sequence[Moment]) -> Moment:
    """The action as a moment of the recording, with the fields that are recorded of its kind."""
    fields = json.loads(json.dumps(dataclasses.asdict(action)))
    names = next(moment.fields for moment in recorded if moment.name == type(action).__name__)
    return Moment(event.at_ms, event.generation, type(action).__name__, {name: fields[name] for name in names})
