"""Every way to divide GPUs among target servers and a drafter: TP inside a server, SP and DP over servers. Pure.

TP (tensor parallelism) is the number of GPUs of one target server. SP (speculation parallelism) is the number of servers of
one generation. DP (data parallelism) is the number of servers that serve different generations at the same time. The
scheduler (workforce/scheduler.py) decides between SP and DP by the number of generations: one server for each generation
before a second server for any. So a division is a degree of TP, a number of servers, and the drafter's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dsi_actors.core import Policy
from dsi_actors.planning.estimates import Estimates
from dsi_actors.planning.expectation import CHAIN, MAX_LOOKAHEAD, Branching, CostMs, expect
from dsi_actors.planning.search import best_dsi, best_si

#: own: a GPU of its own. shared: on a GPU of the target, in turns with it. none: nobody drafts.
DrafterPlace = Literal["own", "shared", "none"]

#: Divisions whose tokens take the same time to within this share count as equally fast.
AS_FAST = 0.01


@dataclass(frozen=True, slots=True)
class Models:
    """What is known of a target and a drafter. Latencies in milliseconds."""

    #: Of a verification, by the degree of TP.
    target_ms: Mapping[int, float]
    drafter_ms: float
    acceptance: float
    branching: Branching = CHAIN
    #: A verification of a full window takes so many times as long as one of a single position; and its positions.
    window_share: float = 1.0
    window: int = 1 << 20
    #: What each position of other generations adds to a forward, at the least degree.
    position_ms: float = 0.0

    @property
    def most(self) -> int:
        """The longest lookahead: one forward verifies one window."""
        return max(1, min(MAX_LOOKAHEAD, self.window - 1))

    def _faster(self, tp: int) -> float:
        return self.target_ms[tp] / self.target_ms[min(self.target_ms)]

    def cost_ms(self, tp: int, sharers: int) -> CostMs:
        """Of a verification by one of `sharers` generations that share a server: all are in the same forward, and plan alike."""
        alone_ms = self.target_ms[tp]
        position_ms = self.position_ms * self._faster(tp)
        shared_ms = alone_ms + position_ms * (sharers - 1)
        return Estimates(
            alone_ms, alone_ms * self.window_share, self.window, position_ms=position_ms, sharers=sharers, shared_ms=shared_ms
        ).cost_ms  # fmt: skip

    def drafter_for(self, generations: int) -> float:
        """Of a drafted token, for each of so many generations in one step. A further row adds the same share of a step as a
        further position adds to the target's forward."""
        row_share = self.position_ms / self.target_ms[min(self.target_ms)]
        return self.drafter_ms * (1 + row_share * (generations - 1))


@dataclass(frozen=True, slots=True)
class Division:
    """One way, and what it gives."""

    algorithm: str
    drafter: DrafterPlace
    tp: int
    #: Target servers in all.
    servers: int
    #: Servers of one generation; servers that serve different ones; generations on one server. Each the largest there is.
    sp: int
    dp: int
    sharers: int
    gpus: int
    #: That of the generations with the most servers.
    policy: Policy
    ms_per_token: float
    #: Of all generations together.
    tokens_per_s: float
    #: Verifications per token of one generation, and device time per token: each GPU of a group counts.
    target_forwards: float
    target_busy_ms: float
    drafter_busy_ms: float

    @property
    def gpu_ms(self) -> float:
        """GPU time per token that is held, busy or not."""
        return 1e3 * self.gpus / self.tokens_per_s


def divisions(models: Models, gpus: int, clients: int = 1) -> Iterator[Division]:
    """All divisions that take at most `gpus` GPUs, for `clients` generations that run all the time. By degree, then plain
    decoding, SI and DSI by the number of servers. Plain decoding uses at most one server for each generation."""
    for tp in sorted(models.target_ms):
        most = gpus // tp
        for servers in range(1, min(clients, most) + 1):
            yield _division(models, "ar", "none", tp, servers, clients)
        if clients == 1 and most:  # several generations would wait for one another's turns: then nobody drafts
            yield _division(models, "si", "shared", tp, 1, clients)
        for servers in range(1, (gpus - 1) // tp + 1):
            yield _division(models, "dsi", "own", tp, servers, clients)


def best_of(found: list[Division]) -> Division:
    """The fastest: of those that are equally fast to within AS_FAST, the one with the fewest GPUs, then the fastest."""
    fastest_ms = min(each.ms_per_token for each in found)
    ties = [each for each in found if each.ms_per_token <= fastest_ms * (1 + AS_FAST)]
    return min(ties, key=lambda each: (each.gpus, each.ms_per_token))


def _division(
    models: Models, algorithm: str, drafter: DrafterPlace, tp: int, servers: int, clients: int
) -> Division:  # fmt: skip
    drafter_ms = models.drafter_for(clients)
    shares = _shares(servers, clients)
    policies = [_policy(models, algorithm, models.cost_ms(tp, each.sharers), drafter_ms, each) for each in shares]
    found = [
        expect(policy, models.cost_ms(tp, share.sharers), drafter_ms, models.acceptance, models.branching)
        for policy, share in zip(policies, shares, strict=True)
    ]
    tokens_per_ms = [share.generations / each.ms_per_token for share, each in zip(shares, found, strict=True)]

    def of_tokens(values: Iterable[float]) -> float:
        """The mean over all tokens."""
        return sum(rate * value for rate, value in zip(tokens_per_ms, values, strict=True)) / sum(tokens_per_ms)

    busy_ms = (each.target_busy_ms / share.sharers for share, each in zip(shares, found, strict=True))
    return Division(
        algorithm, drafter, tp, servers,
        sp=max(share.sp for share in shares) if algorithm == "dsi" else 1,
        dp=min(servers, clients),
        sharers=max(share.sharers for share in shares),
        gpus=tp * servers + (drafter == "own"),
        policy=policies[0],
        ms_per_token=clients / sum(tokens_per_ms),
        tokens_per_s=1e3 * sum(tokens_per_ms),
        target_forwards=of_tokens(each.target_forwards for each in found),
        target_busy_ms=tp * of_tokens(busy_ms),
        drafter_busy_ms=of_tokens(each.drafter_busy_ms for each in found) / clients,
    )  # fmt: skip


def _policy(models: Models, algorithm: str, cost_ms: CostMs, drafter_ms: float, share: _Share) -> Policy:
    if algorithm == "ar":
        return Policy.autoregressive()
    known = (cost_ms, drafter_ms, models.acceptance)
    if algorithm == "si":
        return best_si(*known, models.branching, most=models.most)
    queued = 0 if share.sharers > 1 else None  # those in one forward ask for the next one as soon as it ends
    return best_dsi(*known, share.sp, models.branching, most=models.most, queued=queued)


class _Share(NamedTuple):
    """So many generations have `sp` servers each, on each of which are so many generations."""

    generations: int
    sp: int
    sharers: int


def _shares(servers: int, clients: int) -> list[_Share]:
    """As the scheduler divides them, those with more of a server first. An uneven division makes two kinds."""
    if servers >= clients:
        each, more = divmod(servers, clients)
        kinds = [_Share(more, each + 1, 1), _Share(clients - more, each, 1)]
    else:
        each, more = divmod(clients, servers)
        kinds = [_Share((servers - more) * each, 1, each), _Share(more * (each + 1), 1, each + 1)]
    return [kind for kind in kinds if kind.generations]
