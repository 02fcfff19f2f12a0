"""What is known of a target and of a drafter: how long they take, and how often they agree. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsi_actors.planning.expectation import CostMs

#: Before anything was judged. Int8 copies of a target agree with it about so often, and more.
ASSUMED_ACCEPTANCE = 0.8
#: How often an alternative is right where the first choice is not, before any was seen: between what SpecInfer (arXiv 2305.09781,
#: Table 1) found for two choices and for five.
ASSUMED_ALTERNATIVES = 0.4
#: What is assumed, and what a generation takes over from those before it, counts like so many tokens that were judged.
PRIOR_WEIGHT = 6.0


@dataclass(slots=True)
class Estimates:
    """What is known of target, drafter, and how well they agree. Latency 0: not known yet."""

    #: A verification of one position, and of a full window.
    target_ms: float = 0.0
    window_ms: float = 0.0
    #: Positions of one verification forward.
    window: int = 1
    drafter_ms: float = 0.0
    #: A verification of one position while nobody drafts: as it was measured at the start, then as it is in plain decoding.
    calibrated_ms: float = 0.0
    #: What each further position adds to a forward for several generations.
    position_ms: float = 0.0
    #: Generations that share the target server, and how long a verification of one position takes there, waiting included.
    sharers: int = 1
    shared_ms: float = 0.0
    accepted: float = ASSUMED_ACCEPTANCE * PRIOR_WEIGHT
    judged: float = PRIOR_WEIGHT
    #: Of rejected drafts with an alternative beside them, those whose alternative was right.
    alternatives: float = ASSUMED_ALTERNATIVES * PRIOR_WEIGHT
    offered: float = PRIOR_WEIGHT
    #: What each further row adds to a step of the drafter, as a share of the step.
    drafter_row: float = 0.0
    #: Rows of a tree that drafter and target servers take: 1 is a chain.
    rows: int = 1

    @property
    def acceptance(self) -> float:
        return self.accepted / self.judged

    @property
    def alternative_rate(self) -> float:
        """The chance that an alternative is right where the first choice is wrong."""
        return self.alternatives / self.offered

    def moved_to(self, later: Estimates, share: float) -> Estimates:
        """These, changed by a share of what differs in later ones."""

        def between(before: float, after: float) -> float:
            return before + (after - before) * (share if before > 0 else 1.0)

        return replace(
            later,
            target_ms=between(self.target_ms, later.target_ms),
            window_ms=between(self.window_ms, later.window_ms),
            drafter_ms=between(self.drafter_ms, later.drafter_ms),
            calibrated_ms=between(self.calibrated_ms, later.calibrated_ms),
            position_ms=between(self.position_ms, later.position_ms),
            shared_ms=between(self.shared_ms, later.shared_ms),
        )

    def cost_ms(self, positions: int, branches: int = 0, /) -> float:
        """Of one verification that reads so many positions of the text, and so many on branches: a straight line up to a full
        window, and again for each further window. Branches share the last forward, and lengthen it along that line."""
        full, rest = divmod(positions, self.window)
        target_ms, window_ms = self.latencies_ms
        position_ms = (window_ms - target_ms) / max(1, self.window - 1)
        ms = full * window_ms + branches * position_ms
        if rest:
            ms += target_ms + (rest - 1) * position_ms
        return ms

    @property
    def promised_ms(self) -> float:
        """What a token should take in plain decoding: as long as it was measured without a drafter beside it, or as it takes with
        one, if that is less. 0: nothing was measured."""
        if self.calibrated_ms <= 0:
            return 0.0
        return min(self.calibrated_ms, self.target_ms) + self.position_ms * (self.sharers - 1)

    @property
    def queued(self) -> int | None:
        """Tokens that are drafted while a verification waits for the forward of others to end. None: nobody shares."""
        if self.sharers == 1:
            return None
        waits_ms = self.shared_ms - self.target_ms - self.position_ms * (self.sharers - 1)
        return int(max(0.0, waits_ms) / self.drafter_ms) if self.drafter_ms > 0 else 0

    @property
    def latencies_ms(self) -> tuple[float, float]:
        """Of a verification of one position and of a full window, as things are.

        Who shares a server with others that plan alike pays for their positions, too: each that one generation adds is added
        by all. So what is best for each at these costs is best for all together.
        """
        if self.sharers == 1 or self.shared_ms <= 0:
            return self.target_ms, self.window_ms
        return self.shared_ms, self.shared_ms + self.position_ms * self.sharers * (self.window - 1)


@dataclass(frozen=True, slots=True)
class Guesser:
    """What the planner must know of a drafter: milliseconds of a token, and of so many judged how many were right."""

    drafter_ms: float
    accepted: float
    judged: float
    #: Of rejected drafts with an alternative beside them, those whose alternative was right, and how many there were.
    alternatives: float
    offered: float

    @staticmethod
    def of(estimates: Estimates) -> Guesser:
        return Guesser(
            estimates.drafter_ms, estimates.accepted, estimates.judged, estimates.alternatives, estimates.offered
        )

    @staticmethod
    def unjudged(drafter_ms: float) -> Guesser:
        """Only the latency is known."""
        return Guesser.of(Estimates(drafter_ms=drafter_ms))


def flat(target_ms: float) -> CostMs:
    """A target whose verifications take the same time however long they are."""
    return lambda positions, branches=0: target_ms
