"""The worked exchange of the specification, as the core of an orchestrator runs it."""

from __future__ import annotations

from dsi_actors.config import Config
from dsi_actors.core import GenerationCore
from dsi_actors.core.actions import Action, CancelDrafts, CancelVerify, StartDraft, StartVerify
from dsi_actors.core.events import (
    CancelRequested,
    DraftEnded,
    DrafterJoined,
    DraftsArrived,
    Event,
    ServerJoined,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.policy import Policy
from dsi_actors.generation.prefix_checksums import PrefixChecksums
from dsi_actors.workforce.assignment import Assignment, assign
from dsi_protocol import Cancel, Cancelled, Draft, Drafted, FromOrchestrator, Hello, OpenGeneration, Verified, Verify
from support.vectors import from_json, load

LINES = [(line["from"], line["to"], from_json(line["message"])) for line in load("exchange.json")["cases"]]


def events_of(source: str, message: object) -> list[Event]:
    """What the core is told when this message comes, or goes."""
    match message:
        case Drafted(_, attempt, start, tokens, done):
            return [DraftsArrived(attempt, start, tokens), *([DraftEnded(attempt, complete=True)] if done else [])]
        case Verified(_, attempt, start, tokens):
            return [VerificationFinished(attempt, 1, start, tokens, message.more)]
        case Cancelled(_, attempt):
            return [VerificationAbandoned(attempt, 1) if source == "target" else DraftEnded(attempt, complete=False)]
    return []


def test_the_core_asks_what_the_orchestrator_asks() -> None:
    core = GenerationCore((11, 22, 33), policy=Policy.distributed(2, sp=1), max_tokens=16)
    checksums = PrefixChecksums(core)
    asked: list[tuple[str, FromOrchestrator]] = []

    def do(action: Action) -> None:
        match action:
            case StartVerify(attempt, _, base, tokens, start, ahead=ahead):
                checksum = checksums.of_first(base)
                asked.append(("target", Verify(1, attempt, base, checksum, tokens, start, ahead=ahead)))
            case StartDraft(attempt, base, tokens, start, count, block):
                draft = Draft(1, attempt, base, checksums.of_first(base), tokens, start, count, block)
                asked.append(("drafter", draft))
            case CancelVerify(attempt, _):
                asked.append(("target", Cancel(1, attempt)))
            case CancelDrafts(attempt):
                asked.append(("drafter", Cancel(1, attempt)))

    for number, (source, to, message) in enumerate(LINES):
        if isinstance(message, Draft | Verify | Cancel):
            if not asked and message == Cancel(1, 5):  # the reader has enough
                for action in core.handle(CancelRequested()):
                    do(action)
            assert asked.pop(0) == (to, message), f"line {number + 1}"
        joined = [ServerJoined(1) if to == "target" else DrafterJoined()] if isinstance(message, OpenGeneration) else []
        for event in [*joined, *events_of(source, message)]:
            assert not asked, "all was said before the next message came"
            for action in core.handle(event):
                do(action)
            core.check()
    assert not asked
    assert core.output == [7, 5]


def test_workers_are_told_to_be_what_the_orchestrator_tells_them() -> None:
    config = Config(target="org/model", drafter="org/small")
    welcomes = [message for source, _, message in LINES if source == "orchestrator"][:2]
    for hello, welcome in zip(
        (message for _, _, message in LINES if isinstance(message, Hello)), welcomes, strict=True
    ):
        told = assign(config, hello, targets=1, kinds=())
        assert isinstance(told, Assignment)
        assert (told.role, told.engine, told.model) == (welcome.role, welcome.engine, welcome.model)
        assert {**told.options, "calibrate": config.calibrate} == welcome.options
