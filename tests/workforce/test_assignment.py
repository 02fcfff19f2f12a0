"""What a worker is told to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from dsi_actors.config import Config
from dsi_actors.workforce.assignment import Assignment, assign
from dsi_protocol import PROTOCOL_VERSION, Hello


def hello(model: str = "", role: str = "auto", engine: str = "auto", device: str = "cpu:0") -> Hello:
    return Hello(PROTOCOL_VERSION, 1, role, engine, model, device, "host", 1)


def told(config: Config, said: Hello, targets: int = 1, kinds: Sequence[str] = ()) -> str:
    """The role, and the kind of a drafter."""
    assignment = assign(config, said, targets=targets, kinds=kinds)
    assert isinstance(assignment, Assignment)
    return f"{assignment.role} {assignment.kind}".strip()


BOTH = Config(target="T", drafter=("self-int8", "ngram"))
ONE = Config(target="T", drafter="self-int8")


@pytest.mark.parametrize(
    ("config", "targets", "kinds", "expected"),
    [
        (ONE, 0, (), "target"),
        (ONE, 1, (), "drafter self-int8"),
        (ONE, 1, ("self-int8",), "target"),
        (ONE, 1, ("another",), "target"),
        (BOTH, 1, (), "drafter self-int8"),
        (BOTH, 1, ("self-int8",), "drafter ngram"),
        (BOTH, 1, ("ngram",), "drafter self-int8"),
        (BOTH, 1, ("ngram", "self-int8"), "target"),
        (BOTH, 1, ("another", "self-int8"), "target"),
        (Config(target="T", drafter=None), 1, (), "target"),
    ],
)
def test_who_asks_becomes_what_is_missing(config: Config, targets: int, kinds: tuple[str, ...], expected: str) -> None:
    assert told(config, hello(), targets, kinds) == expected


def test_who_has_a_model_becomes_what_it_is_for() -> None:
    assert [told(ONE, hello("T"), kinds=["self-int8"] * number) for number in range(3)] == ["target"] * 3
    assert told(ONE, hello("small")) == "drafter small"
    assert told(BOTH, hello("self-int8"), kinds=["self-int8", "ngram"]) == "drafter self-int8"
    assert told(ONE, hello(engine="ngram"), targets=0) == "drafter ngram"
    refused = assign(
        ONE, Hello(PROTOCOL_VERSION, 1, "auto", "auto", "small", "cpu:0", "h", 1), targets=1, kinds=("self-int8",)
    )
    assert refused == "it has the model 'small', but the target is 'T'"


def test_a_target_may_draft_for_itself() -> None:
    """In int8, say."""
    config = Config(target="T", drafter="T")
    assert told(config, hello("T"), targets=0) == "target"
    assert told(config, hello("T"), targets=1) == "drafter T"
    assert told(config, hello("T"), targets=1, kinds=["T"]) == "target"


def test_who_has_another_engine_than_target_servers_drafts_with_it() -> None:
    for role in ("drafter", "auto"):
        assigned = assign(ONE, hello("small", role, "their-own"), targets=0, kinds=())
        assert assigned == Assignment("drafter", "their-own", "small", {"target": "T"}, "small")
    refused = assign(ONE, hello(role="target", engine="their-own"), targets=0, kinds=())
    assert refused == "it has the engine 'their-own', but target servers here run 'transformers'"
    theirs = Config(target="T", drafter="D", engine="their-own")
    assert assign(theirs, hello(), targets=0, kinds=()) == Assignment("target", "their-own", "T", {})
    assert assign(theirs, hello("D"), targets=0, kinds=()) == Assignment(
        "drafter", "their-own", "D", {"target": "T"}, "D"
    )


@pytest.mark.parametrize("config", [ONE, BOTH, Config(engine="timed"), Config(target="T", drafter=None)])
def test_a_drafter_with_an_engine_of_its_own_is_told_that_engine(config: Config) -> None:
    """As one in another language has. It was told to run ours, which it could only refuse."""
    assigned = assign(config, hello(role="drafter", engine="rust-lookup"), targets=1, kinds=())
    assert assigned == Assignment("drafter", "rust-lookup", "", config.drafter_options, "rust-lookup")
    assigned = assign(config, hello("its-model", role="drafter", engine="rust-llm"), targets=1, kinds=())
    options = {**config.drafter_options, "target": config.target}
    assert assigned == Assignment("drafter", "rust-llm", "its-model", options, "its-model")


def test_a_target_with_an_engine_of_its_own_is_refused() -> None:
    refused = assign(ONE, hello(role="target", engine="rust-llm"), targets=1, kinds=())
    assert refused == "it has the engine 'rust-llm', but target servers here run 'transformers'"


def test_workers_that_share_a_gpu_are_told_to_share_its_memory() -> None:
    config = Config(target="T", drafter=("self-int8", "ngram"), sp=3, devices=("0", "1"), target_options={"slots": 4})

    def options(role: str, device: str, model: str = "", given: Config = config) -> Mapping[str, object]:
        assignment = assign(given, hello(model, role, device=device), targets=1, kinds=())
        assert isinstance(assignment, Assignment)
        return assignment.options

    assert options("target", "cuda:0") == {"memory_share": 0.45, "slots": 4}
    assert options("target", "cuda:1") == {"memory_share": 0.45, "slots": 4}
    assert options("drafter", "cuda:1") == {"memory_share": 0.45, "quantization": "int8"}
    assert "memory_share" not in options("drafter", "cuda:1", "ngram")
    alone = Config(target="T", drafter="ngram", sp=2, devices=("0", "1"))
    assert options("target", "cuda:0", given=alone) == {}
    assert options("target", "cpu:0", given=Config(target="T", sp=2, devices=("cpu",))) == {}
    elsewhere = Config(target="T", sp=2, devices=("0",), listen="tcp://127.0.0.1:5")
    assert options("target", "cuda:0", given=elsewhere) == {}, "who starts those workers knows what they share"


def test_a_copy_of_the_target_has_its_weights_in_fewer_bits() -> None:
    for kind, quantization in (("self-int8", "int8"), ("self-int4", "int4"), ("ngram+self-int4", "int4")):
        assigned = assign(Config(target="T", drafter=kind), hello(kind, role="drafter"), targets=1, kinds=())
        assert isinstance(assigned, Assignment)
        assert (assigned.model, assigned.options["quantization"]) == ("T", quantization)


def test_only_what_computes_keeps_a_device_busy() -> None:
    for model, computes in (("self-int8", True), ("ngram", False), ("random", False), ("other", True)):
        assigned = assign(
            ONE, Hello(PROTOCOL_VERSION, 1, "drafter", "auto", model, "cuda:0", "h", 1), targets=1, kinds=()
        )
        assert isinstance(assigned, Assignment)
        assert assigned.occupies_device == computes


def test_a_drafter_with_an_engine_of_its_own_is_told_the_model_that_is_configured() -> None:
    config = Config(target="T", drafter=("ngram", "D"))
    assigned = assign(config, hello(role="drafter", engine="rust-llm"), targets=1, kinds=())
    assert assigned == Assignment("drafter", "rust-llm", "D", {"target": "T"}, "rust-llm")


def test_a_target_that_drafts_for_itself_has_its_adapter() -> None:
    config = Config(target="T", drafter=("self-int8", "small"), target_options={"adapter": "A"})
    options = {}
    for kind in config.drafters:
        assignment = assign(config, hello(kind, role="drafter"), targets=1, kinds=())
        assert isinstance(assignment, Assignment)
        options[kind] = assignment.options.get("adapter")
    assert options == {"self-int8": "A", "small": None}
