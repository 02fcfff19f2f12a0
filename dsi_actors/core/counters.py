"""What happened in a generation, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What happened so far. All count from the start of the generation."""

    drafted: int = 0  #: tokens that arrived from a live draft attempt, branches included
    judged: int = 0  #: main-path tokens that were compared with the target's own
    accepted: int = 0  #: of those, equal
    offered: int = 0  #: of those that differed, those with an alternative beside them
    alternatives: int = 0  #: of those, the target's token was an alternative
    rejections: int = 0  #: corrections that dropped work: no draft had the target's token
    verifications: int = 0  #: verifications started
    useful_verifications: int = 0  #: verifications that committed at least one token
    stale_events: int = 0  #: replies of dead attempts
    gaps: int = 0  #: answers behind one of the same attempt that was lost
    disagreements: int = 0  #: answers that contradict committed tokens or answer what was not asked: dropped
