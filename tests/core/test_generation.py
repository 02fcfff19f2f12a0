"""The core against the plainest oracle there is: the target's own tokens, one after another."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsi_actors.core import GenerationCore, Policy
from dsi_actors.core.actions import (
    Action,
    CancelDrafts,
    CancelVerify,
    EmitTokens,
    Finish,
    Judged,
    StartDraft,
    StartVerify,
    VerifyGoesOn,
)
from dsi_actors.core.events import (
    CancelRequested,
    DraftEnded,
    DrafterJoined,
    DrafterLost,
    DraftsArrived,
    DraftsLate,
    Event,
    PolicyChanged,
    ServerJoined,
    ServerLost,
    VerificationAbandoned,
    VerificationFinished,
)
from dsi_actors.core.generation import WRONG_IN_A_ROW
from dsi_actors.core.policy import UNLIMITED
from dsi_actors.simulation.discrete_events import DiscreteEventDriver
from dsi_actors.simulation.scripts import constant, walk

VOCABULARY = 5
#: What may become of a verification's answer.
FATES = ["as is"] * 4 + ["forgot", "failed", "elsewhere", "beyond the difference"]


def target(prefix: Sequence[int]) -> int:
    """A 'model' whose next token depends on the whole prefix: a wrong prefix shows at once."""
    return zlib.crc32(bytes(prefix)) % VOCABULARY


def drafter(prefix: Sequence[int]) -> int:
    """Right about three times in four, by a function of the prefix."""
    wrong = zlib.crc32(bytes(prefix), 7) % 4 == 0
    return (target(prefix) + wrong) % VOCABULARY


class PrefixScript:
    """Target and drafter whose tokens depend on the whole text before."""

    def draft(self, tokens: Sequence[int]) -> int:
        return drafter(tokens)

    def alternative(self, tokens: Sequence[int]) -> int:
        """Right where the first choice is wrong, two times in three."""
        return (drafter(tokens) + (VOCABULARY - 1 if zlib.crc32(bytes(tokens), 9) % 3 else 2)) % VOCABULARY

    def truth(self, tokens: Sequence[int]) -> int:
        return target(tokens)

    def answer(self, tokens: list[int], start: int) -> tuple[int, ...]:
        return walk(target, tokens[:start], tokens[start:], (), start)


def plain_decoding(prompt: Sequence[int], max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(target(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


chains = st.one_of(
    st.just(Policy.autoregressive()),
    st.builds(Policy.speculative, st.integers(1, 6)),
    st.builds(Policy.distributed, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9)),
    st.builds(
        lambda sp, lookahead, ahead, wait, span: Policy("any", sp, lookahead, min(wait, ahead), ahead, span),
        st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5),
    ),
)  # fmt: skip
#: Half of them with branches.
policies = st.one_of(
    chains,
    st.builds(
        lambda policy, rows, branches: replace(policy, rows=rows, branches=branches),
        chains, st.integers(2, 4), st.sampled_from([0, 1, 3, 100]),
    ),
)  # fmt: skip


#: Servers may go on behind corrections, and drafts take the place of what they do by themselves.
policies_that_go_on = st.builds(
    lambda lookahead, sp, branches: replace(Policy.distributed(lookahead, sp), rows=1 + branches, branches=branches),
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 0, 3]),
)  # fmt: skip


def test_a_server_that_left_and_came_back_is_not_taken_for_warm() -> None:
    core = GenerationCore((1, 2, 3), policy=Policy.autoregressive(), max_tokens=8)
    [first] = core.handle(ServerJoined(1))
    assert isinstance(first, StartVerify)
    core.handle(VerificationFinished(first.attempt, 1, 3, (4,)))  # server 1 is warm, and busy with the next token
    core.handle(ServerLost(1))
    [second] = core.handle(ServerJoined(2))
    assert isinstance(second, StartVerify)
    core.handle(ServerJoined(1))
    [again] = core.handle(VerificationAbandoned(second.attempt, 2))
    assert isinstance(again, StartVerify)
    assert again.server == 2, "it has read the text, and server 1 has forgotten it"


def main_path(tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """The first children of a request's tree, from its first token on."""
    if not parents:
        return list(tokens)
    found, place = list[int](), 0
    for number, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1):
        if parent == place:
            found.append(token)
            place = number
    return found


@dataclass
class Drafter:
    """What a drafter of the adversary holds."""

    rank: int
    rows: int
    liar: bool
    tokens: list[int] = field(default_factory=list)
    #: The text that ends with each of its drafts, by number.
    numbered: dict[int, list[int]] = field(default_factory=dict)
    main_number: int = 0

    def says(self, text: Sequence[int]) -> int:
        """A liar says something else than the target, always."""
        if self.liar:
            return (target(text) + 1 + self.rank) % VOCABULARY
        return drafter(text) if self.rank else (drafter(text) + zlib.crc32(bytes(text), 3) % 2) % VOCABULARY


class Adversary:
    """Holds every reply that is owed and lets hypothesis choose which comes next, is lost, or comes twice."""

    def __init__(self, core: GenerationCore, data: st.DataObject, *, busy: bool) -> None:
        self.core = core
        self.data = data
        self.busy = busy
        self.emitted: list[int] = []
        self.reasons: list[str] = []
        self.owed: list[Event] = []
        self.next_server = 0
        self.servers: dict[int, list[int]] = {}
        #: How many further answers each server may give by itself to what it was asked last.
        self.ahead: dict[int, int] = {}
        #: Servers of which an answer was lost: the core does not know what they hold.
        self.obscure: set[int] = set()
        #: Attempts of which an answer was given, and what each server was asked last.
        self.went_on: set[int] = set()
        self.busy_with: dict[int, int] = {}
        self.cancelled: set[int] = set()
        #: What was verified last, for answers that go on where they should stop: the tokens before, and the request.
        self.asked: dict[int, tuple[list[int], StartVerify]] = {}
        self.next_drafter = 0
        self.drafters: dict[int, Drafter] = {}

    def feed(self, event: Event) -> None:
        committed = self.core.tokens[: self.core.committed]
        actions = self.core.handle(event)
        self.core.check()
        assert self.core.tokens[: len(committed)] == committed, "committed only grows"
        for action in actions:
            self.do(action)
        for owed in self.owed:
            if isinstance(owed, VerificationFinished):
                wanted = owed.attempt in self.core._verifications
                ended = owed.attempt in self.cancelled or owed.attempt != self.busy_with[owed.server]
                assert wanted or ended, "no server computes for nobody"

    def do(self, action: Action) -> None:
        match action:
            case StartVerify(attempt, server, base, tokens, start, parents, ahead):
                held = self.servers[server]
                for place, owed in enumerate(self.owed):  # what the server did by itself ends
                    if isinstance(owed, VerificationFinished) and owed.server == server:
                        assert owed.attempt in self.went_on, "a server has one request at a time, unless it goes on"
                        ended = VerificationAbandoned(owed.attempt, server)
                        if owed.more and self.data.draw(st.booleans(), label="answered before it heard"):
                            self.owed.append(ended)
                        else:
                            self.owed[place] = ended
                self.busy_with[server] = attempt
                if server in self.obscure and held[:base] != self.core.tokens[:base]:  # the checksum tells
                    self.owed.append(VerificationAbandoned(attempt, server, held=0))
                    return
                assert base <= len(held), "the core assumed more than the server was ever told"
                self.obscure.discard(server)
                main = main_path(tokens, parents)
                before = held[:base]
                held[base:] = main
                assert held == self.core.tokens[: len(held)], "a verification reads the current text"
                assert len(held) >= self.core.committed, "and all that is committed"
                assert not parents or all(0 <= parent <= place for place, parent in enumerate(parents))
                self.asked[attempt] = (before, action)
                self.ahead[attempt] = ahead
                assert ahead <= self.core.end - 1 - start, "no answer lies past the end"
                self.answer(attempt, server, start, walk(target, before, tokens, parents, start))
            case VerifyGoesOn(attempt, server, start):
                assert self.core.committed == start
                [owed] = [
                    owed for owed in self.owed if isinstance(owed, VerificationFinished) and owed.attempt == attempt
                ]
                assert (owed.server, owed.start) == (server, start), "the server does what the core believes"
            case StartDraft(attempt, base, tokens, start, count, block, rows, _, number):
                drafter = self.drafters[number]
                assert rows <= drafter.rows
                if len(drafter.tokens) < base:  # it has forgotten
                    self.owed.append(DraftEnded(attempt, complete=False, held=len(drafter.tokens), drafter=number))
                    return
                assert drafter.tokens[:base] == self.core.tokens[:base], "a checksum of the text says what it builds on"
                if start <= base + len(tokens):
                    drafter.tokens[base:] = tokens
                    drafter.numbered = {start - 1: drafter.tokens[:start]}
                    drafter.main_number = start - 1
                assert len(drafter.tokens) >= start
                del drafter.tokens[start:]
                self.draft(number, attempt, count, block, rows)
            case CancelVerify(attempt, server):
                self.cancelled.add(attempt)
                # The cancel may come too late, so the answer stays possible; or it turns into an abandonment.
                if self.data.draw(st.booleans(), label="cancel obeyed"):
                    self.owed = [
                        VerificationAbandoned(attempt, server)
                        if isinstance(owed, VerificationFinished) and owed.attempt == attempt
                        else owed
                        for owed in self.owed
                    ]
            case CancelDrafts():
                pass  # the worst drafter: never stops
            case EmitTokens(start, tokens, accepted, _):
                assert start == self.core.prompt_length + len(self.emitted)
                assert len(tokens) == len(accepted) > 0
                self.emitted.extend(tokens)
            case Judged():
                assert 0 <= action.alternatives <= action.offered <= action.judged - action.accepted
            case Finish(reason):
                self.reasons.append(reason)

    def answer(self, attempt: int, server: int, start: int, tokens: tuple[int, ...]) -> None:
        """The server owes this answer; it may go on by itself then."""
        more = self.ahead[attempt] > 0 and (self.busy or self.data.draw(st.booleans(), label="goes on"))
        self.owed.append(VerificationFinished(attempt, server, start, tokens, more))

    def go_on(self, event: VerificationFinished) -> None:
        """The server has given this answer, and begins with the next one before anybody hears of it."""
        if self.busy_with[event.server] != event.attempt:
            return
        self.ahead[event.attempt] -= 1
        self.went_on.add(event.attempt)
        held = self.servers[event.server]
        held[event.start :] = event.tokens
        self.answer(event.attempt, event.server, len(held), (target(held),))

    def draft(self, number: int, attempt: int, count: int, block: int, rows: int) -> None:
        """Everything at once, in blocks: the main path, and beside it branches as chance has it."""
        drafter = self.drafters[number]
        numbered, front = drafter.numbered, len(drafter.tokens) + count
        while count:
            first, tokens, parents = len(numbered) + min(numbered), list[int](), list[int]()
            for _ in range(min(block, count)):
                grow = [drafter.main_number]
                if rows > 1:
                    numbers = [each for each, text in numbered.items() if len(text) < front]
                    grow += self.data.draw(st.lists(st.sampled_from(numbers), max_size=rows), label="branches")
                for place, parent in enumerate(grow):
                    text = numbered[parent]
                    chance = self.data.draw(st.integers(0, VOCABULARY - 1), label="branch") if place else 0
                    tokens.append(chance if place else drafter.says(text))
                    parents.append(parent)
                    numbered[first + len(tokens) - 1] = [*text, tokens[-1]]
                    if place == 0:
                        drafter.main_number = first + len(tokens) - 1
            count -= min(block, count)
            in_tree = tuple(parents) if rows > 1 else ()
            self.owed.append(DraftsArrived(attempt, first, tuple(tokens), in_tree, number))
        drafter.tokens[:] = numbered[drafter.main_number]
        self.owed.append(DraftEnded(attempt, complete=True, drafter=number))

    def join_server(self) -> None:
        self.servers[self.next_server] = []
        self.next_server += 1
        rows = self.data.draw(st.sampled_from([UNLIMITED, UNLIMITED, 1, 6]), label="rows of the server")
        self.feed(ServerJoined(self.next_server - 1, rows))

    def join_drafter(self) -> None:
        """One that says what others say, or lies; that leads, or follows."""
        rank = self.data.draw(
            st.sampled_from([rank for rank in range(3) if all(rank != each.rank for each in self.drafters.values())])
        )
        rows = self.data.draw(st.sampled_from([UNLIMITED, 1]), label="rows of the drafter")
        self.drafters[self.next_drafter] = Drafter(rank, rows, liar=self.data.draw(st.booleans(), label="liar"))
        self.next_drafter += 1
        self.feed(DrafterJoined(self.next_drafter - 1, rank, rows))

    def lose_server(self, server: int) -> None:
        del self.servers[server]
        self.owed = [
            owed
            for owed in self.owed
            if not isinstance(owed, VerificationFinished | VerificationAbandoned) or owed.server != server
        ]
        self.feed(ServerLost(server))

    def step(self) -> None:
        choices = ["reply"] * (40 if self.busy else 6) if self.owed else []
        if len(self.servers) < 4:
            choices.append("join server")
        if self.servers:
            choices += ["lose server"]
        choices += ["join drafter"] * (len(self.drafters) < 3) + ["lose drafter"] * bool(self.drafters)
        choices.append("drafts late")
        match self.data.draw(st.sampled_from(choices), label="step"):
            case "join server":
                self.join_server()
            case "lose server":
                self.lose_server(self.data.draw(st.sampled_from(sorted(self.servers))))
            case "join drafter":
                self.join_drafter()
            case "drafts late":
                self.feed(DraftsLate())
            case "lose drafter":
                number = self.data.draw(st.sampled_from(sorted(self.drafters)))
                del self.drafters[number]
                self.feed(DrafterLost(number))
            case _:
                self.reply()

    def reply(self) -> None:
        event = self.owed.pop(self.data.draw(st.integers(0, len(self.owed) - 1), label="which"))
        match event:
            case VerificationFinished(attempt, server):
                fate = self.data.draw(st.sampled_from(FATES), label="fate")
                if event.more and fate not in ("failed", "forgot"):
                    self.go_on(event)
                    if self.data.draw(st.integers(0, 5), label="answer lost") == 0:
                        self.obscure.add(server)
                        return
                if fate == "forgot" and self.busy_with[server] == attempt:
                    self.servers[server] = []
                    event = VerificationAbandoned(attempt, server, held=0)
                elif fate in ("failed", "forgot"):
                    event = VerificationAbandoned(attempt, server)
                elif fate == "elsewhere":
                    event = replace(event, start=event.start + 1, tokens=(*event.tokens[1:], 0))
                elif fate == "beyond the difference":  # what the target says behind a wrong guess is worth nothing
                    before, asked = self.asked[attempt]
                    text = [*before, *asked.tokens]
                    beyond = [target(text[:end]) for end in range(event.start, len(text) + 1)]
                    if (
                        asked.parents or event.start > asked.start
                    ):  # or it went on: it was told nothing that stands there
                        beyond = [*event.tokens, 0]
                    event = replace(event, tokens=tuple(beyond))
            case DraftsArrived() if self.data.draw(st.integers(0, 5), label="lost") == 0:
                return  # lost drafts cost time only
            case DraftsArrived(attempt, start, tokens, parents, number) if (
                parents and self.data.draw(st.integers(0, 9), label="broken") == 0
            ):
                event = DraftsArrived(attempt, start, tokens, (*parents[:-1], start + len(tokens)), number)
            case DraftsArrived(_, _, tokens) if self.data.draw(st.integers(0, 9), label="another one's") == 0:
                event = replace(event, drafter=event.drafter + 1)
            case DraftEnded() if self.data.draw(st.integers(0, 5), label="cut short") == 0:
                event = replace(event, complete=False)
            case DraftEnded(_, _, _, number) if (
                number in self.drafters and self.data.draw(st.integers(0, 9), label="drafter forgot") == 0
            ):
                self.drafters[number].tokens.clear()
                event = replace(event, complete=False, held=0)
            case _:
                pass
        self.feed(event)
        again = isinstance(event, DraftsArrived | DraftEnded) or (
            isinstance(event, VerificationFinished) and event.more
        )
        if again and self.data.draw(st.integers(0, 9), label="twice") == 0:
            self.feed(event)


def any_interleaving(data: st.DataObject, policy: Policy, *, busy: bool = False) -> None:
    """One generation among adversaries. `busy`: workers are there from the start and seldom leave, and servers go on whenever
    they may."""
    prompt = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), label="prompt")
    max_tokens = 30 if busy else data.draw(st.integers(1, 14), label="max_tokens")
    stop = data.draw(st.sampled_from([frozenset[int](), frozenset({0}), frozenset({1, 2})]), label="stop")
    whole = plain_decoding(prompt, max_tokens, stop)
    resumed = whole[: data.draw(st.sampled_from([0, 0, 1, 5]), label="resumed")]
    if len(resumed) == len(whole):
        resumed = []
    core = GenerationCore(prompt, policy=policy, max_tokens=max_tokens, stop_tokens=stop, resumed=resumed)
    adversary = Adversary(core, data, busy=busy)
    adversary.emitted = list(resumed)
    if busy:
        adversary.join_drafter()
        for _ in range(policy.sp):
            adversary.join_server()
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        adversary.step()
        if data.draw(st.integers(0, 15), label="new policy") == 15:
            adversary.feed(PolicyChanged(replace(data.draw(policies, label="policy"), sp=core.policy.sp)))
    if data.draw(st.integers(0, 7), label="the reader leaves") == 7 and not core.finished:
        adversary.feed(CancelRequested())
        assert adversary.reasons == ["cancelled"]
    # From here on the world is kind: one server stays, every reply comes in order, so the generation must end.
    if not adversary.servers:
        adversary.join_server()
    patience = 4000  # drafters that are cancelled never stop here
    while not core.finished:
        assert patience, "the generation hangs"
        patience -= 1
        assert adversary.owed, "nothing is running and the generation is not finished"
        event = adversary.owed.pop(0)
        if isinstance(event, VerificationFinished) and event.more:
            adversary.go_on(event)
        adversary.feed(event)
    assert adversary.emitted == core.output == whole[: len(core.output)]
    if core.finish_reason != "cancelled":
        assert core.output == whole
        assert adversary.reasons == ["stop" if core.output[-1] in stop else "length"]
    for owed in adversary.owed:  # what comes after the end changes nothing
        assert core.handle(owed) == []
        core.check()


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_interleaving_gives_the_targets_own_text(data: st.DataObject) -> None:
    """Late, lost, duplicate, reordered and forged replies; servers and several drafters that come and go, some of which
    always lie; servers that go on by themselves; a reader who leaves. Resumed or from the start."""
    any_interleaving(data, data.draw(policies, label="policy"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_servers_that_go_on_while_drafts_come_never_change_the_text(data: st.DataObject) -> None:
    any_interleaving(data, data.draw(policies_that_go_on, label="policy"), busy=True)


class OtherScript(PrefixScript):
    """Another drafter, which is right about half of the time."""

    def draft(self, tokens: Sequence[int]) -> int:
        return (target(tokens) + zlib.crc32(bytes(tokens), 13) % 2) % VOCABULARY


@settings(max_examples=300)
@given(
    policy=policies, seed=st.integers(0, 10**6), servers=st.integers(1, 4),
    target_ms=st.sampled_from([1.0, 4.3, 9.7]), others_ms=st.lists(st.sampled_from([0.1, 0.7, 2.2]), max_size=2),
)  # fmt: skip
def test_in_virtual_time_too(policy: Policy, seed: int, servers: int, target_ms: float, others_ms: list[float]) -> None:
    prompt = [seed % VOCABULARY, seed // VOCABULARY % VOCABULARY, seed // 25 % VOCABULARY]
    core = GenerationCore(prompt, policy=policy, max_tokens=40)
    DiscreteEventDriver(
        core, PrefixScript(), target_ms=lambda _: target_ms, drafter_ms=lambda _: 1.0, servers=servers, check=True,
        others=[(OtherScript(), constant(other_ms)) for other_ms in others_ms],
    ).run()  # fmt: skip
    assert core.output == plain_decoding(prompt, 40)


def test_cancel_ends_everything() -> None:
    core = GenerationCore([1, 2], policy=Policy.distributed(1, sp=2), max_tokens=8)
    for event in (ServerJoined(0), ServerJoined(1), DrafterJoined()):
        core.handle(event)
    started = core.handle(DraftsArrived(2, 2, (drafter([1, 2]),)))
    assert [type(action) for action in started] == [StartVerify]
    actions = core.handle(CancelRequested())
    assert {type(action) for action in actions} == {CancelVerify, CancelDrafts, Finish}
    assert actions[-1] == Finish("cancelled")
    assert sorted(action.attempt for action in actions if isinstance(action, CancelVerify)) == [1, 3]
    assert core.finish_reason == "cancelled"
    assert core.handle(VerificationFinished(1, 0, 2, (0,))) == []
    core.check()


def test_a_rejection_cancels_all_that_was_built_on_it_and_starts_again_at_once() -> None:
    prompt = [3]
    truth = plain_decoding(prompt, 4)
    wrong = (truth[1] + 1) % VOCABULARY
    core = GenerationCore(prompt, policy=Policy.distributed(1, sp=3), max_tokens=4)
    for event in (ServerJoined(0), ServerJoined(1), ServerJoined(2), DrafterJoined()):
        core.handle(event)
    core.handle(DraftsArrived(2, 1, (truth[0],)))
    core.handle(DraftsArrived(2, 2, (wrong,)))
    actions = core.handle(VerificationFinished(3, 1, 1, tuple(truth[:2])))
    assert [type(action).__name__ for action in actions] == [
        "StartVerify", "CancelDrafts", "StartDraft", "CancelVerify", "CancelVerify", "EmitTokens", "Judged",
    ]  # fmt: skip
    verify = actions[0]
    assert isinstance(verify, StartVerify)
    assert (verify.server, verify.base, verify.tokens, verify.start) == (1, 2, (truth[1],), 3)
    emit = next(action for action in actions if isinstance(action, EmitTokens))
    assert emit == EmitTokens(1, tuple(truth[:2]), (True, False))


def joined(policy: Policy, servers: int, max_tokens: int = 20) -> GenerationCore:
    core = GenerationCore([1], policy=policy, max_tokens=max_tokens)
    core.handle(DrafterJoined())
    for number in range(servers):
        core.handle(ServerJoined(number))
    return core


def test_an_answer_that_covers_more_outruns_the_earlier_ones() -> None:
    core = joined(Policy.distributed(1, sp=3), 3)  # attempts: 1 draft, 2 verify
    core.handle(DraftsArrived(1, 1, (5,)))
    core.handle(DraftsArrived(1, 2, (6,)))
    actions = core.handle(VerificationFinished(4, 2, 1, (5, 6, 7)))
    assert [CancelVerify(2, 0), CancelVerify(3, 1)] == [a for a in actions if isinstance(a, CancelVerify)]
    assert EmitTokens(1, (5, 6, 7), (True, True, False)) in actions
    core.check()


def test_a_draft_that_comes_after_its_position_was_committed_is_judged_late() -> None:
    core = joined(Policy.distributed(1, sp=1), 1)
    core.handle(VerificationFinished(2, 0, 1, (5,)))
    actions = core.handle(DraftsArrived(1, 1, (6,)))
    assert [type(action) for action in actions] == [CancelDrafts, StartDraft, Judged]
    restart = actions[1]
    assert isinstance(restart, StartDraft)
    assert (restart.base, restart.tokens, restart.start) == (1, (5,), 2)
    assert (core.counters.judged, core.counters.accepted) == (1, 0)


def test_a_span_leaves_drafts_to_the_next_verification() -> None:
    core = joined(Policy.distributed(1, sp=2, first_wait=2, max_ahead=9, span=2), 2)
    started = core.handle(DraftsArrived(1, 1, (5, 6)))  # the first block is what the first verification waits for
    assert [action.tokens for action in started if isinstance(action, StartVerify)] == [(1, 5, 6)]
    for position in (3, 4, 5):
        started += core.handle(DraftsArrived(2, position, (7,)))
    first, second = (action for action in started if isinstance(action, StartVerify))
    assert (second.base, second.tokens) == (0, (1, 5, 6, 7)), "one draft beyond the first was enough to begin"
    actions = core.handle(VerificationFinished(first.attempt, first.server, 1, (5, 6, 7)))
    [third] = (action for action in actions if isinstance(action, StartVerify))
    assert third.base + len(third.tokens) == 6, "of two further drafts"
    core.check()


@pytest.mark.parametrize("algorithm", ["dsi", "si"])
@pytest.mark.parametrize("length", [2, 9, 10, 300])
def test_a_server_with_much_to_read_does_not_wait_for_drafts(algorithm: str, length: int) -> None:
    si = algorithm == "si"
    policy = Policy.speculative(2) if si else Policy.distributed(1, sp=1, first_wait=2, max_ahead=9)
    core = GenerationCore([1] * length, policy=policy, max_tokens=20)
    core.handle(DrafterJoined())
    actions = core.handle(ServerJoined(0))
    assert [type(action) for action in actions] == ([StartVerify] if length > 9 and not si else [])
    if actions:  # from then on drafts are worth waiting for
        assert isinstance(actions[0], StartVerify)
        assert core.handle(DraftsArrived(1, length, (5,))) == []
        after = core.handle(VerificationFinished(actions[0].attempt, 0, length, (6,)))
        assert not any(isinstance(action, StartVerify) for action in after)


def test_a_span_of_nothing_is_plain_decoding() -> None:
    core = joined(Policy.distributed(1, sp=3, span=0), 3)
    for position in (1, 2, 3):
        assert core.handle(DraftsArrived(1, position, (5,))) == []
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    [verify] = (action for action in actions if isinstance(action, StartVerify))
    assert verify.base + len(verify.tokens) == 2
    assert core.counters.accepted == 1, "drafts are judged all the same"


def test_a_policy_may_change_while_work_runs() -> None:
    core = joined(Policy.distributed(4, sp=2), 2)
    core.handle(DraftsArrived(1, 1, (5,)))
    assert core.counters.verifications == 1, "lookahead 4: one draft is not enough for a second verification"
    [verify] = core.handle(PolicyChanged(Policy.distributed(1, sp=2)))
    assert isinstance(verify, StartVerify)


def test_drafts_that_nobody_will_verify_are_cancelled() -> None:
    core = joined(Policy.distributed(1, sp=1), 1)
    core.handle(DraftsArrived(1, 1, (5,)))
    [cancel] = core.handle(PolicyChanged(Policy.undrafted(1)))
    assert cancel == CancelDrafts(1)
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    assert {type(action) for action in actions} == {EmitTokens, Judged, StartVerify}
    [draft] = core.handle(PolicyChanged(Policy.distributed(1, sp=1)))
    assert isinstance(draft, StartDraft)
    assert draft.start == 2, "after what is committed"
    core.check()


def test_a_drafter_without_an_idea_is_asked_again_after_the_next_commit() -> None:
    core = joined(Policy.distributed(1, sp=1), 1)
    assert core.handle(DraftEnded(1, complete=False)) == []
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    assert {type(action) for action in actions} == {EmitTokens, Judged, StartDraft, StartVerify}


def test_a_gap_in_the_drafts_ends_them_until_the_next_commit() -> None:
    """A block was lost, so the position of the guesses behind it is unknown. The drafter is asked again from the gap on."""
    core = joined(Policy.distributed(1, sp=1), 1)
    assert core.handle(DraftsArrived(1, 2, (6,))) == [CancelDrafts(1)]
    assert core.handle(DraftsArrived(1, 3, (7,))) == [], "the rest of them is late"
    assert core.counters.drafted == 0
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    [draft] = (action for action in actions if isinstance(action, StartDraft))
    assert (draft.base, draft.tokens, draft.start) == (1, (5,), 2)
    core.check()


def test_an_end_of_drafts_behind_a_gap_is_noticed_too() -> None:
    core = joined(Policy.distributed(1, sp=1), 1)
    core.handle(DraftsArrived(1, 1, (5,)))
    assert core.handle(DraftEnded(1, complete=True)) == [], "the last block was lost"
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    [draft] = (action for action in actions if isinstance(action, StartDraft))
    assert (draft.base, draft.start) == (2, 2)
    core.check()


def test_a_drafter_that_lost_its_guesses_makes_them_again_for_the_draft_that_continues_them() -> None:
    core = GenerationCore([1], policy=Policy.distributed(1, 1, 2), max_tokens=8)
    first, second = (action for action in core.handle(DrafterJoined()) if isinstance(action, StartDraft))
    assert (first.start, second.base, second.tokens) == (1, 1, ())
    core.handle(DraftsArrived(second.attempt, first.start, (5, 6, 7)))  # it begins where its tokens end
    assert core.tokens == [1, 5, 6, 7]
    core.check()


def test_an_end_that_comes_before_the_end_of_an_earlier_attempt_settles_both() -> None:
    core = GenerationCore([1], policy=Policy.distributed(1, 1, 2), max_tokens=8)
    first, second = (action for action in core.handle(DrafterJoined()) if isinstance(action, StartDraft))
    core.handle(DraftsArrived(first.attempt, 1, (5, 6)))
    for position in range(second.start, second.start + second.count):
        core.handle(DraftsArrived(second.attempt, position, (7,)))
    core.handle(DraftEnded(second.attempt, complete=True))
    core.handle(ServerJoined(0))
    core.check()
    stale = core.counters.stale_events
    core.handle(DraftEnded(first.attempt, complete=True))
    assert core.counters.stale_events == stale + 1
    core.check()


def test_a_drafter_far_behind_skips_ahead() -> None:
    core = joined(Policy.distributed(1, sp=1), 1)
    started: list[StartDraft] = []
    for attempt in range(2, 12):
        for action in core.handle(VerificationFinished(attempt, 0, attempt - 1, (5,))):
            if isinstance(action, StartDraft):
                started.append(action)
        if started:
            break
    assert started[0].start == core.committed
    assert started[0].tokens == tuple(core.tokens[1:])


def test_an_answer_that_contradicts_what_is_committed_is_dropped() -> None:
    core = joined(Policy.distributed(1, sp=2), 2)
    core.handle(DraftsArrived(1, 1, (5,)))
    core.handle(DraftsArrived(1, 2, (6,)))
    core.handle(VerificationFinished(2, 0, 1, (5,)))
    assert core.handle(VerificationFinished(3, 1, 1, (9, 8))) == []
    assert core.counters.disagreements == 1
    assert core.output == [5]
    [verify] = core.handle(DraftsArrived(1, 3, (7,)))
    assert isinstance(verify, StartVerify)
    assert (verify.server, verify.base) == (1, 0), "what it holds is not trusted: it is told everything again"
    core.check()


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 4), ([1], 0), ([1], -1)])
def test_bad_input_is_refused(prompt: list[int], max_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        GenerationCore(prompt, policy=Policy.autoregressive(), max_tokens=max_tokens)


def test_what_is_resumed_at_its_end_is_finished() -> None:
    policy = Policy.distributed(1, sp=2)
    assert GenerationCore([1], policy=policy, max_tokens=2, resumed=[5, 6]).finish_reason == "length"
    assert GenerationCore([1], policy=policy, max_tokens=9, stop_tokens=[6], resumed=[5, 6]).finish_reason == "stop"
    assert not GenerationCore([1], policy=policy, max_tokens=9, stop_tokens=[7], resumed=[5, 6]).finished


def test_nothing_waits_for_ever_for_a_drafter_that_hangs() -> None:
    core = joined(Policy.speculative(4), 1)  # attempts: 1 draft; verification waits for 4 guesses
    assert core.waits_for_drafts
    [verify] = core.handle(DraftsLate())
    assert isinstance(verify, StartVerify)
    assert not core.waits_for_drafts
    again = core.handle(VerificationFinished(verify.attempt, 0, 1, (5,)))
    [running] = [action for action in again if isinstance(action, StartVerify)]  # as long as no drafts come
    core.handle(DraftsArrived(1, 1, (5, 6, 7)))
    core.handle(VerificationFinished(running.attempt, 0, 2, (6,)))
    assert core.waits_for_drafts, "and again when they do"
    core.check()


def plain(max_tokens: int = 20, stop: frozenset[int] = frozenset()) -> tuple[GenerationCore, StartVerify]:
    """Plain decoding behind two tokens, and its first request."""
    core = GenerationCore([1, 2], policy=Policy.autoregressive(), max_tokens=max_tokens, stop_tokens=stop)
    [verify] = core.handle(ServerJoined(0))
    assert isinstance(verify, StartVerify)
    return core, verify


def kinds(actions: Sequence[Action]) -> list[type[Action]]:
    return [type(action) for action in actions]


def test_plain_decoding_needs_one_request() -> None:
    core, verify = plain(max_tokens=3)
    assert verify.ahead == 2, "no answer lies past the end"
    for position in (2, 3):
        actions = core.handle(VerificationFinished(1, 0, position, (5,), more=True))
        assert actions == [
            EmitTokens(position, (5,), (False,)), Judged(1), VerifyGoesOn(1, 0, position + 1),
        ]  # fmt: skip
        core.check()
    assert kinds(core.handle(VerificationFinished(1, 0, 4, (5,)))) == [EmitTokens, Judged, Finish]
    assert core.counters.verifications == core.counters.useful_verifications == 3


def test_a_server_that_does_not_go_on_is_asked_for_each_token() -> None:
    core, _ = plain()
    for attempt in (1, 2, 3):
        actions = core.handle(VerificationFinished(attempt, 0, attempt + 1, (5,)))
        assert StartVerify(attempt + 1, 0, attempt + 1, (5,), attempt + 2, (), 20 - attempt - 1) in actions


def test_a_server_that_goes_on_is_stopped_at_a_stop_token() -> None:
    core, _ = plain(stop=frozenset({7}))
    actions = core.handle(VerificationFinished(1, 0, 2, (7,), more=True))
    assert kinds(actions) == [CancelVerify, EmitTokens, Judged, Finish]
    assert core.handle(VerificationFinished(1, 0, 3, (5,), more=True)) == [], "it had not heard"
    assert core.handle(VerificationAbandoned(1, 0)) == []


def test_what_stands_behind_a_lost_answer_is_not_used() -> None:
    core, _ = plain()
    core.handle(VerificationFinished(1, 0, 2, (5,), more=True))
    [again] = core.handle(VerificationFinished(1, 0, 4, (7,), more=True))
    assert again == StartVerify(2, 0, 3, (), 3), "from what is committed, and without going on"
    assert core.handle(VerificationFinished(1, 0, 5, (8,), more=True)) == [], "it had not heard"
    assert core.handle(VerificationAbandoned(1, 0)) == [], "it is busy with the other request"
    actions = core.handle(VerificationFinished(2, 0, 3, (6,)))
    [verify] = [action for action in actions if isinstance(action, StartVerify)]
    assert verify.ahead, "it is trusted again"
    assert core.output == [5, 6]
    assert (core.counters.gaps, core.counters.disagreements) == (1, 0)
    core.check()


def test_an_answer_that_comes_again_changes_nothing() -> None:
    core, _ = plain()
    answer = VerificationFinished(1, 0, 2, (5,), more=True)
    core.handle(answer)
    assert core.handle(answer) == []
    core.check()
    assert VerifyGoesOn(1, 0, 4) in core.handle(VerificationFinished(1, 0, 3, (5,), more=True))


def test_drafts_take_the_place_of_what_a_server_does_by_itself() -> None:
    core = joined(Policy.undrafted(1), 1)
    core.handle(VerificationFinished(1, 0, 1, (5,), more=True))
    [draft] = core.handle(PolicyChanged(Policy.distributed(1, sp=1)))
    assert isinstance(draft, StartDraft)
    core.handle(DraftsArrived(draft.attempt, 2, (6, 7)))
    actions = core.handle(VerificationFinished(1, 0, 2, (6,), more=True))
    [verify] = [action for action in actions if isinstance(action, StartVerify)]
    assert (verify.base, verify.tokens, verify.start) == (3, (7,), 3)
    assert not any(isinstance(action, CancelVerify) for action in actions), "the request itself ends it"
    core.check()


def test_a_server_that_waits_for_drafts_does_not_go_on() -> None:
    core = joined(Policy.undrafted(1), 1)
    core.handle(PolicyChanged(Policy.speculative(4)))
    actions = core.handle(VerificationFinished(1, 0, 1, (5,), more=True))
    assert CancelVerify(1, 0) in actions
    assert not any(isinstance(action, StartVerify | VerifyGoesOn) for action in actions)
    core.check()


def test_a_lost_server_loses_what_it_does_by_itself() -> None:
    core, _ = plain()
    core.handle(ServerJoined(1))
    core.handle(VerificationFinished(1, 0, 2, (5,), more=True))
    [verify] = core.handle(ServerLost(0))
    assert isinstance(verify, StartVerify)
    assert (verify.server, verify.tokens, verify.start) == (1, (1, 2, 5), 3)


def test_behind_a_correction_the_server_has_begun_before_the_core_hears_of_it() -> None:
    core = joined(Policy.distributed(1, sp=2), 2)  # attempts: 1 draft, 2 verify
    [verify] = core.handle(DraftsArrived(1, 1, (5, 6)))
    assert isinstance(verify, StartVerify)
    assert verify.ahead == 1, "the token behind the correction"
    actions = core.handle(VerificationFinished(verify.attempt, verify.server, 1, (9,), more=True))
    assert VerifyGoesOn(verify.attempt, verify.server, 2) in actions
    assert not any(isinstance(action, StartVerify) for action in actions)
    core.check()
    core.handle(DraftsArrived(next(a.attempt for a in actions if isinstance(a, StartDraft)), 2, (7,)))
    core.check()
    emitted = core.handle(VerificationFinished(verify.attempt, verify.server, 2, (7,)))
    assert EmitTokens(2, (7,), (True,)) in emitted
    core.check()


def test_a_server_that_would_wait_for_drafts_behind_a_correction_is_not_allowed_to_go_on() -> None:
    core = joined(Policy.distributed(1, sp=1, first_wait=2), 1)
    [verify] = core.handle(DraftsArrived(1, 1, (5, 6)))
    assert isinstance(verify, StartVerify)
    assert verify.ahead == 0


def test_a_server_goes_on_while_no_drafter_has_an_idea() -> None:
    """As with prompt lookup where nothing repeats: that is plain decoding, until drafts come."""
    core = joined(Policy.distributed(1, sp=1), 1)
    core.handle(DraftEnded(1, complete=False))
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    [verify] = [action for action in actions if isinstance(action, StartVerify)]
    assert (verify.start, verify.ahead) == (2, 18), "as far as the text may be long"
    for position in (2, 3):
        [draft] = [action for action in actions if isinstance(action, StartDraft)]
        core.handle(DraftEnded(draft.attempt, complete=False))
        actions = core.handle(VerificationFinished(verify.attempt, 0, position, (5,), more=True))
        assert VerifyGoesOn(verify.attempt, 0, position + 1) in actions
        core.check()
    [draft] = [action for action in actions if isinstance(action, StartDraft)]
    core.handle(DraftsArrived(draft.attempt, 4, (5, 6)))
    actions = core.handle(VerificationFinished(verify.attempt, 0, 4, (5,), more=True))
    [drafted] = [action for action in actions if isinstance(action, StartVerify)]
    assert (drafted.start, drafted.tokens, drafted.ahead) == (5, (6,), 1)
    assert not any(isinstance(action, VerifyGoesOn | CancelVerify) for action in actions)


def test_a_drafter_that_had_no_idea_is_not_waited_for_behind_the_next_token() -> None:
    """Where drafts are waited for, and nothing repeats, each token took two round trips more than in plain decoding."""
    core = joined(Policy.distributed(1, sp=1, first_wait=3), 1)
    [verify] = [action for action in core.handle(DraftEnded(1, complete=False)) if isinstance(action, StartVerify)]
    assert verify.ahead == 0, "nothing is known of this drafter"
    actions = core.handle(VerificationFinished(verify.attempt, 0, 1, (5,)))
    [verify] = [action for action in actions if isinstance(action, StartVerify)]
    draft, *_ = [action for action in actions if isinstance(action, StartDraft)]
    assert (verify.start, verify.ahead) == (2, 18)
    core.handle(DraftEnded(draft.attempt, complete=False))
    actions = core.handle(VerificationFinished(verify.attempt, 0, 2, (5,), more=True))
    assert VerifyGoesOn(verify.attempt, 0, 3) in actions
    draft, *_ = [action for action in actions if isinstance(action, StartDraft)]
    core.handle(DraftsArrived(draft.attempt, 3, (5, 6)))
    actions = core.handle(VerificationFinished(verify.attempt, 0, 3, (5,), more=True))
    assert CancelVerify(verify.attempt, 0) in actions
    assert core.handle(VerificationAbandoned(verify.attempt, 0)) == []
    assert core.waits_for_drafts, "it has ideas again"
    assert core.handle(DraftsArrived(draft.attempt, 5, (7,))) == []
    [drafted] = core.handle(DraftsArrived(draft.attempt + 1, 6, (8,)))
    assert isinstance(drafted, StartVerify)
    assert (drafted.start, drafted.tokens) == (4, (6, 7, 8))
    core.check()


def test_a_server_does_not_go_on_while_drafts_are_on_their_way() -> None:
    """The request behind its answer brings them."""
    core = joined(Policy.distributed(1, sp=1), 1)
    core.handle(DraftsArrived(1, 1, (6,)))
    actions = core.handle(VerificationFinished(2, 0, 1, (5,)))
    [verify] = [action for action in actions if isinstance(action, StartVerify)]
    assert (verify.start, verify.tokens, verify.ahead) == (2, (5,), 0)


def test_a_server_does_not_wait_for_drafts_that_are_wrong_again_and_again() -> None:
    """Each token took a round trip more than in plain decoding."""
    core = joined(Policy.distributed(1, sp=1), 1)
    draft, attempt = 1, 2
    for position in range(1, 1 + WRONG_IN_A_ROW):
        core.handle(DraftsArrived(draft, position, (6,)))
        actions = core.handle(VerificationFinished(attempt, 0, position, (5,)))
        [verify] = [action for action in actions if isinstance(action, StartVerify)]
        attempt, draft = verify.attempt, max(a.attempt for a in actions if isinstance(a, StartDraft))
        assert (verify.ahead > 0) == (position == WRONG_IN_A_ROW)
    core.handle(DraftsArrived(draft, verify.start, (6,)))
    actions = core.handle(VerificationFinished(attempt, 0, verify.start, (5,), more=True))
    assert VerifyGoesOn(attempt, 0, verify.start + 1) in actions, "what was drafted is wrong once more"
    draft = max(a.attempt for a in actions if isinstance(a, StartDraft))
    core.handle(DraftsArrived(draft, verify.start + 1, (5, 6)))
    actions = core.handle(VerificationFinished(attempt, 0, verify.start + 1, (5,), more=True))
    [again] = [action for action in actions if isinstance(action, StartVerify)]
    assert (again.tokens, again.ahead) == ((6,), 1), (
        "one was right: what follows it takes the place of what the server began"
    )
    core.check()
