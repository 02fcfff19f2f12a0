"""The pure core: one deterministic state machine per generation, without clock, sockets or randomness."""

from dsi_actors.core.counters import Counters
from dsi_actors.core.generation import GenerationCore
from dsi_actors.core.policy import Policy

__all__ = ["Counters", "GenerationCore", "Policy"]
