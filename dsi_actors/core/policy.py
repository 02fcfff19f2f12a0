"""AR, SI and DSI as settings of one state machine.

Five numbers tell them apart: how many servers may verify at once, how many drafted tokens lie between the ends of two
successive verifications at least, how many at most, how many drafts to wait for before the first verification after a
correction, and how far the drafter may run ahead of what is committed.
"""

from __future__ import annotations

from dataclasses import dataclass

UNLIMITED = 1 << 30
#: Tokens that any drafter may be ahead: one answer must fit one frame of the protocol.
MOST_AHEAD = 8192


@dataclass(frozen=True, slots=True)
class Policy:
    """When to draft and when to verify. Build one with `autoregressive`, `speculative` or `distributed`."""

    algorithm: str
    #: Servers that verify at the same time (speculation parallelism), >= 1.
    sp: int
    #: Drafted tokens between the ends of two successive live verifications, >= 1.
    lookahead: int
    #: Drafted tokens to wait for when nothing is being verified. 0 verifies at once.
    first_wait: int
    #: Tokens the drafter may be ahead of the committed ones. 0 drafts nothing.
    max_ahead: int
    #: Drafted tokens that a verification may check beyond the one before it. 0 checks none: plain decoding.
    span: int = UNLIMITED
    #: Rows of a drafting step, >= 1: one for the main path, the others for branches. 1 drafts a chain.
    rows: int = 1
    #: Positions on branches that a verification may carry beside the main path.
    branches: int = 0

    def __post_init__(self) -> None:
        if self.sp < 1:
            raise ValueError(f"sp must be at least 1, not {self.sp}")
        if self.lookahead < 1:
            raise ValueError(f"lookahead must be at least 1, not {self.lookahead}")
        if self.rows < 1 or self.branches < 0:
            raise ValueError(f"rows must be at least 1 and branches at least 0, not {self.rows} and {self.branches}")
        if self.span < 0:
            raise ValueError(f"span must be at least 0, not {self.span}")
        if self.first_wait < 0 or self.first_wait > self.max_ahead:
            raise ValueError(f"first_wait must lie in [0, max_ahead={self.max_ahead}], not {self.first_wait}")

    @staticmethod
    def autoregressive() -> Policy:
        """Non-speculative decoding: one forward of one server per token, no drafts."""
        return Policy("ar", sp=1, lookahead=1, first_wait=0, max_ahead=0)

    @staticmethod
    def speculative(lookahead: int) -> Policy:
        """Speculative inference (Leviathan et al., 2023): draft `lookahead` tokens, verify them, repeat."""
        return Policy("si", sp=1, lookahead=lookahead, first_wait=lookahead, max_ahead=lookahead)

    @staticmethod
    def undrafted(sp: int) -> Policy:
        """DSI that leaves the drafter alone: plain decoding, on whichever of its servers."""
        return Policy("dsi", sp=sp, lookahead=1, first_wait=0, max_ahead=0, span=0)

    @staticmethod
    def distributed(
        lookahead: int, sp: int, first_wait: int = 0, *, max_ahead: int = 0, span: int = UNLIMITED
    ) -> Policy:
        """DSI (Timor et al., Algorithm 1 with lookahead): drafting never waits.

        With `first_wait` 0 verification starts at once after a correction, as in the paper. With few servers waiting
        for some drafts first can be faster (planning/expectation.py), and where long verifications are dear so can
        leaving some drafts to the next one. The drafter may run ahead by what `sp` servers
        verify and one block more, or by `max_ahead` if that is more.
        """
        ahead = min(MOST_AHEAD, max((sp + 1) * lookahead, first_wait + lookahead, max_ahead))
        return Policy("dsi", sp=sp, lookahead=lookahead, first_wait=first_wait, max_ahead=ahead, span=span)


def worth_verifying(policy: Policy, drafted: int, covered: int, *, running: bool, drafts_coming: bool = True) -> bool:
    """Whether a further verification should start: the one rule, for the core and for the planner's arithmetic.

    `drafted`: tokens of the main path behind what is committed; `covered`: of those, tokens that live verifications check.
    `running`: there are some. `drafts_coming`: the drafter is at work.
    """
    if not running:
        return drafted >= policy.first_wait or not drafts_coming
    return policy.span > 0 and drafted - covered >= (policy.lookahead if drafts_coming else 1)
