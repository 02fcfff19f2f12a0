"""What `dsi-actors generate` tells of how tokens came."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from dsi_actors.cli.generate import _marks, _Run, _table
from dsi_actors.cli.main import _parser
from dsi_actors.config import Algorithm
from dsi_actors.core import GenerationCore, Policy
from dsi_actors.generation.account import Account
from dsi_actors.results import CommittedTokens


def a_run(algorithm: Algorithm, accepted: Sequence[bool], by_alternative: Sequence[bool]) -> _Run:
    run = _Run([], [])
    run.add(CommittedTokens(range(len(accepted)), accepted, by_alternative=by_alternative))
    policy = {"ar": Policy.autoregressive(), "si": Policy.speculative(3), "dsi": Policy.distributed(2, 2)}[algorithm]
    run.report = Account().report(GenerationCore([1], policy=policy, max_tokens=9), policy.sp, "")
    return run


def shown(run: _Run, encoding: str) -> str:
    return _marks(run, Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding)))


TREE = a_run("dsi", [False, True, True, True], [False, True, False, False])
CHAIN = a_run("si", [False, True, True, False], [False] * 4)
PLAIN = a_run("ar", [False] * 4, [False] * 4)


def test_tokens_by_an_alternative_have_a_mark_of_their_own() -> None:
    assert shown(TREE, "utf-8") == (
        "○◆●●\n● drafted and accepted: 2   ◆ drafted as an alternative, and accepted: 1   ○ the target's own: 1"
    )
    assert shown(TREE, "ascii").startswith(".+##\n# drafted and accepted: 2   + drafted as an alternative")


def test_without_any_there_is_no_word_of_them() -> None:
    assert shown(CHAIN, "utf-8") == "○●●○\n● drafted and accepted: 2   ○ the target's own: 2"


@pytest.mark.parametrize(("dsi", "cells"), [(TREE, ["-", "0", "1"]), (CHAIN, None)])
def test_the_comparison_has_a_column_of_them_where_there_are_any(dsi: _Run, cells: list[str] | None) -> None:
    table = _table({"ar": PLAIN, "si": CHAIN, "dsi": dsi})
    found = {str(column.header): list(column.cells) for column in table.columns}
    assert found.get("by alternatives") == cells


@pytest.mark.parametrize(("words", "rows"), [([], None), (["--rows", "auto"], None), (["--rows", "4"], 4)])
def test_rows_are_chosen_or_given(words: list[str], rows: int | None) -> None:
    assert _parser().parse_args(["generate", "x", *words]).rows == rows


def test_no_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["generate", "x", "--rows", "0"])
    assert "give auto or a whole number of at least 1" in capsys.readouterr().err
