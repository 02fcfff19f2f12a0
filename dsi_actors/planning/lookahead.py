"""How many tokens to draft for one verification, from the latencies of target and drafter (arXiv 2405.14105)."""

from __future__ import annotations

import math

#: Where nothing was measured yet. Int8 copies of a target agree with it about so often, and more.
ASSUMED_ACCEPTANCE = 0.8
MAX_LOOKAHEAD = 32


def dsi_lookahead(target_ms: float, drafter_ms: float, sp: int) -> int:
    """The smallest lookahead for which `sp` servers are enough: Equation 1, SP >= ceil(t / (k d)), solved for k."""
    if drafter_ms <= 0:
        return MAX_LOOKAHEAD
    return min(MAX_LOOKAHEAD, max(1, math.ceil(target_ms / (sp * drafter_ms))))


def si_ms_per_token(target_ms: float, drafter_ms: float, acceptance: float, lookahead: int) -> float:
    """Expected time per token of SI: (k d + t)(1 - a) / (1 - a^(k+1)) (Leviathan et al., 2023)."""
    expected_tokens = sum(acceptance**i for i in range(lookahead + 1))
    return (lookahead * drafter_ms + target_ms) / expected_tokens


def si_lookahead(target_ms: float, drafter_ms: float, acceptance: float = ASSUMED_ACCEPTANCE) -> int:
    """The lookahead that makes SI fastest."""
    return min(
        range(1, MAX_LOOKAHEAD + 1),
        key=lambda lookahead: si_ms_per_token(target_ms, drafter_ms, acceptance, lookahead),
    )
